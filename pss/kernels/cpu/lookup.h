// What one lookup reads: the packed plan of pss/kernels/plan.py, and jagged ids in the order of the output.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include "plan_layout.h"  // written by pss/kernels/plan.py when this is built

namespace pss {

using i64 = int64_t;
using u64 = uint64_t;
using u32 = uint32_t;

struct HashConstants {  // pss.hashing.HashConstants
  u64 multiplier;       // a of the affine families, 0 for the independent one
  std::vector<u64> table_keys, chunk_keys;
};

struct Plan {  // pss.kernels.plan.RobePlan
  i64 embedding_dim, block_size, memory_size, features, chunks, tiers;
  i64 chunk_size, rows_per_block;  // a chunk is a block, or a row where a block of the flattened table holds several
  bool is_mean, is_flattened, has_private_rows, is_signed;
  HashConstants location, sign;
  std::vector<u64> starts, slots;  // [tier]
  std::vector<i64> bounds;         // [tier from 1 on][feature]
  std::vector<i64> private_bounds, private_starts;

  explicit Plan(c10::IntArrayRef packed) {
    using namespace layout;
    constexpr i64 kHead = kNumberCount + kArrayCount;
    TORCH_CHECK(i64(packed.size()) > kHead && packed[kLayout] == kId,
                "the packed plan has another layout than this kernel was built for");
    TORCH_CHECK(packed[kHead - 1] == i64(packed.size()), "the packed plan has ", packed.size(), " numbers, not ",
                packed[kHead - 1]);
    const auto read = [&](Array array, auto& values) {
      const i64 begin = array == 0 ? kHead : packed[kNumberCount + array - 1], end = packed[kNumberCount + array];
      TORCH_CHECK(kHead <= begin && begin <= end && end <= i64(packed.size()), "the packed plan has no such array");
      values.assign(packed.begin() + begin, packed.begin() + end);
    };
    embedding_dim = packed[kEmbeddingDim], block_size = packed[kBlockSize], memory_size = packed[kMemorySize];
    features = packed[kFeatures], chunks = packed[kChunks], tiers = packed[kTiers];
    is_mean = packed[kIsMean], is_flattened = packed[kIsFlattened];
    rows_per_block = is_flattened ? std::max<i64>(1, block_size / embedding_dim) : 1;
    chunk_size = std::min(block_size, embedding_dim);
    location.multiplier = packed[kLocationMultiplier], sign.multiplier = packed[kSignMultiplier];
    read(kLocationTableKeys, location.table_keys), read(kLocationChunkKeys, location.chunk_keys);
    read(kSignTableKeys, sign.table_keys), read(kSignChunkKeys, sign.chunk_keys);
    read(kStarts, starts), read(kSlots, slots), read(kBounds, bounds);
    read(kPrivateBounds, private_bounds), read(kPrivateStarts, private_starts);
    has_private_rows = !private_bounds.empty(), is_signed = !sign.table_keys.empty();
    TORCH_CHECK(i64(location.table_keys.size()) == features && i64(starts.size()) == tiers &&
                    i64(bounds.size()) == (tiers - 1) * features,
                "the arrays of the packed plan do not fit its numbers");
  }

  i64 width_of(i64 chunk) const { return std::min(chunk_size, embedding_dim - chunk * chunk_size); }
  // Whether ids of one feature differ in where their chunks may be: location = hash in their slots + their start.
  bool has_starts() const { return tiers > 1 || has_private_rows || rows_per_block > 1; }
};

struct Lookup {
  Plan plan;
  at::Tensor ids, offsets, weights;  // kept alive
  std::vector<i64> features;         // of the batch that serves each of ours
  i64 rows;                          // B
  const i64* offset;                 // (features of the batch · B + 1,)
  const float* weight;               // nullptr if not weighted
  bool has_one_id_per_bag, is_scaled;
  i64 visited_ids;                   // of our features

  Lookup(const at::Tensor& ids_, const at::Tensor& offsets_, const std::optional<at::Tensor>& weights_, i64 rows_,
         c10::IntArrayRef features_, c10::IntArrayRef packed)
      : plan(packed), ids(ids_.contiguous()), offsets(offsets_.to(at::kLong).contiguous()),
        features(features_.begin(), features_.end()), rows(rows_) {
    TORCH_CHECK(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, "ids must be int32 or int64");
    TORCH_CHECK(i64(features.size()) == plan.features, "the plan is for ", plan.features, " features");
    if (weights_) weights = weights_->to(at::kFloat).contiguous();
    offset = offsets.const_data_ptr<i64>();
    weight = weights_ ? weights.const_data_ptr<float>() : nullptr;
    has_one_id_per_bag = true, visited_ids = 0;
    const i64 bags = offsets.numel() - 1;
    for (i64 feature : features) {
      TORCH_CHECK(feature >= 0 && (feature + 1) * rows <= bags, "feature ", feature, " is not in the batch");
      const i64 *first = offset + feature * rows, *last = first + rows;
      TORCH_CHECK(*first >= 0 && *first <= *last && *last <= ids.numel(), "offsets are not those of the ids");
      i64 other = 0;  // a loop that vectorises
      for (i64 bag = 0; bag < rows; bag++) other |= (first[bag + 1] - first[bag]) ^ 1;
      has_one_id_per_bag &= other == 0;
      visited_ids += *last - *first;
    }
    TORCH_CHECK(weight == nullptr || weights.numel() == ids.numel(), "one weight for every id");
    is_scaled = weight || plan.is_signed || (plan.is_mean && !has_one_id_per_bag);
  }
};

}  // namespace pss
