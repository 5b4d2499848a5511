// The chunks that a batch reads, divided by where in M they are: for gradients that several threads add up, and for
// sums that must be complete before they are used.
//
// Each bucket is a part of M that fits the L2 cache. Within a bucket chunks keep the order of the batch, so every
// element of M gets its addends in one order, whatever the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <array>
#include <atomic>
#include <utility>

#include "chunks.h"

namespace pss {

struct Entry {
  u32 location;  // with kSign
  u32 source;    // bag · chunks + chunk, bags in the order of the output
};

// f(block) over blocks of the rows [from, to).
template <class F>
void for_each_block(const Lookup& lookup, i64 from, i64 to, F f) {
  LocatedBlock block;
  const i64 step = LocatedBlock::rows_per_block(lookup);
  for (i64 row = from; row < to; row += step) {
    block.locate(lookup, row, std::min(row + step, to));
    f(block);
  }
}

struct NoScratch {
  explicit NoScratch(i64) {}
};

class Buckets {
 public:
  Buckets(const Lookup& lookup, int threads) : lookup_(lookup), threads_(threads) {
    const Plan& plan = lookup.plan;
    while ((i64(1) << shift_) < plan.chunk_size || (plan.memory_size >> shift_) > kMostBuckets) shift_++;
    const auto may_be_halved = [&] { return shift_ > kSmallest && size() / 2 >= plan.chunk_size; };
    while (may_be_halved() && (plan.memory_size >> shift_) < 8 * threads) shift_--;
    count_ = (plan.memory_size + size() - 1) >> shift_;
    place_entries();
  }

  i64 count() const { return count_; }
  i64 size() const { return i64(1) << shift_; }

  // f(bucket, first element of M, elements, scratch of this thread) for every bucket, on all threads. Scratch is for
  // its owner to make what it wants of.
  template <class Scratch, class F>
  void for_each(F f) const {
    std::atomic<i64> next{0};
    at::parallel_for(0, threads_, 1, [&](i64 from, i64 to) {
      for (i64 thread = from; thread < to; thread++) {
        Scratch scratch(size());
        for (i64 bucket = next++; bucket < count_; bucket = next++) {
          const i64 first = bucket << shift_;
          f(bucket, first, std::min(size(), lookup_.plan.memory_size - first), scratch);
        }
      }
    });
  }

  // sums[e] += scale · gradient over all chunks that read element first + e, e in [0, elements).
  template <int Z>
  void add(i64 bucket, const float* gradient, float scale, float* sums, i64 first, i64 elements) const {
    const Plan& plan = lookup_.plan;
    const i64 end = start_[bucket + 1], chunks = plan.chunks, dim = plan.embedding_dim;
    for (i64 x = start_[bucket]; x < end; x++) {
      if (x + kAhead < end) {
        const Entry ahead = entries_[x + kAhead];
        prefetch<Z, Cache::kL2>(gradient + (Z ? i64(ahead.source) * Z : i64(ahead.source) / chunks * dim));
        prefetch<Z, Cache::kL1>(sums + i64(ahead.location & ~kSign) - first);
      }
      const Entry entry = entries_[x];
      const i64 place = i64(entry.location & ~kSign) - first, chunk = Z ? 0 : entry.source % chunks;
      const float* from = gradient + (Z ? i64(entry.source) * Z : entry.source / chunks * dim + chunk * plan.chunk_size);
      const i64 width = Z ? Z : plan.width_of(chunk);
      const float factor = weights_ ? scale * with_sign(weights_[x], entry.location) : scale;
      if (place >= 0 && place + width <= elements) add_chunk<Z>(sums + place, from, factor, width);
      else {  // it lies across two buckets: this one's share
        const i64 begin = std::max<i64>(0, -place), stop = std::min(width, elements - place);
        if (begin < stop) add_chunk<0>(sums + place + begin, from + begin, factor, stop - begin);
      }
    }
  }

  // Appends to slots every element that any chunk reads, rising, and to values the sum of the gradients of each. Sorted
  // chunks that touch are one island of elements: the work does not depend on how much of M lies between them.
  void add_sparse(i64 bucket, const float* gradient, i64 first, i64 elements, std::vector<i64>& slots,
                  std::vector<float>& values) const {
    const Plan& plan = lookup_.plan;
    const i64 start = start_[bucket];
    const u32 chunks = u32(plan.chunks);
    slots.reserve((start_[bucket + 1] - start) * plan.chunk_size), values.reserve(slots.capacity());
    for (const u64 key : sorted_keys(start, start_[bucket + 1])) {
      const i64 x = start + i64(key & 0xFFFFFFFF), location = i64(key >> 32);
      const Entry entry = entries_[x];
      const i64 bag = entry.source / chunks, chunk = entry.source % chunks;
      const i64 begin = std::max(location, first), end = std::min(location + plan.width_of(chunk), first + elements);
      const float* from = gradient + bag * plan.embedding_dim + chunk * plan.chunk_size;
      const float factor = weights_ ? with_sign(weights_[x], entry.location) : with_sign(1.f, entry.location);
      for (i64 e = slots.empty() ? begin : std::max(begin, slots.back() + 1); e < end; e++)
        slots.push_back(e), values.push_back(0.f);
      float* sums = &values[values.size() - 1 - (slots.back() - begin)];  // from begin to the end all are there
      for (i64 e = begin; e < end; e++) sums[e - begin] += from[e - location] * factor;
    }
  }

 private:
  // location << 32 | x - start of the entries [start, end), by location and then by place in the batch.
  std::vector<u64> sorted_keys(i64 start, i64 end) const {
    constexpr int kDigit = 9;
    std::vector<u64> keys(end - start), other(end - start);
    for (i64 x = start; x < end; x++) keys[x - start] = u64(entries_[x].location & ~kSign) << 32 | u64(x - start);
    for (int low = 32; low < 63; low += kDigit) {  // least digit first; the high ones are mostly equal, and then skipped
      std::array<u32, 1 << kDigit> next{};
      for (const u64 key : keys) next[key >> low & (next.size() - 1)]++;
      if (std::find(next.begin(), next.end(), u32(keys.size())) != next.end()) continue;
      u32 sum = 0;
      for (u32& place : next) sum += std::exchange(place, sum);
      for (const u64 key : keys) other[next[key >> low & (next.size() - 1)]++] = key;
      keys.swap(other);
    }
    return keys;
  }

  static constexpr i64 kMostBuckets = 1024, kSmallest = 10, kAhead = 32;

  const Lookup& lookup_;
  const int threads_;
  int shift_ = 16;  // 256 KiB
  i64 count_ = 0;
  std::vector<i64> start_;
  at::Tensor entry_storage_, weight_storage_;
  Entry* entries_ = nullptr;
  float* weights_ = nullptr;

  // f(location, source, weight, its first bucket, its last bucket) for the chunks of the rows [from, to), in order.
  template <class F>
  void visit(i64 from, i64 to, F f) const {
    const Plan& plan = lookup_.plan;
    for_each_block(lookup_, from, to, [&](const LocatedBlock& block) {
      i64 q = 0;
      for (i64 bag = block.first_row * plan.features; bag < block.last_row * plan.features; bag++, q++)
        for (i64 x = block.bag_start[q]; x < block.bag_start[q + 1]; x++)
          for (i64 j = 0; j < plan.chunks; j++) {
            const u32 location = block.chunk(j)[x], place = location & ~kSign;
            const float weight = lookup_.is_scaled ? block.weight[x] : 1.f;
            f(location, u32(bag * plan.chunks + j), weight, place >> shift_, (place + plan.chunk_size - 1) >> shift_);
          }
    });
  }

  // Counted first and placed then: locations are cheaper to compute again than to keep.
  void place_entries() {
    const Plan& plan = lookup_.plan;
    TORCH_CHECK(lookup_.rows * plan.features * plan.chunks < (i64(1) << 32), "a batch of 2^32 chunks or more");
    const i64 stride = count_ + 16;  // a chunk may end beyond the last bucket's elements; and threads apart
    std::vector<i64> next(threads_ * stride, 0);
    const auto on_each_thread = [&](auto f) {
      at::parallel_for(0, threads_, 1, [&](i64 from, i64 to) {
        for (i64 thread = from; thread < to; thread++)
          f(next.data() + thread * stride, lookup_.rows * thread / threads_, lookup_.rows * (thread + 1) / threads_);
      });
    };
    on_each_thread([&](i64* counts, i64 from, i64 to) {
      visit(from, to, [&](u32, u32, float, u32 bucket, u32 last) {
        counts[bucket]++;
        if (last != bucket) counts[last]++;
      });
    });
    i64 sum = 0;
    start_.assign(count_ + 1, 0);
    for (i64 bucket = 0; bucket < count_; bucket++) {
      start_[bucket] = sum;
      for (int thread = 0; thread < threads_; thread++) sum += std::exchange(next[thread * stride + bucket], sum);
    }
    start_[count_] = sum;
    entry_storage_ = at::empty({sum}, at::kLong);
    entries_ = static_cast<Entry*>(entry_storage_.data_ptr());
    if (lookup_.is_scaled) weight_storage_ = at::empty({sum}, at::kFloat), weights_ = weight_storage_.data_ptr<float>();
    on_each_thread([&](i64* places, i64 from, i64 to) {
      visit(from, to, [&](u32 location, u32 source, float weight, u32 bucket, u32 last) {
        for (u32 b = bucket; b <= last && b < count_; b += std::max(1u, last - bucket)) {
          const i64 place = places[b]++;
          entries_[place] = {location, source};
          if (weights_) weights_[place] = weight;
        }
      });
    });
  }
};

}  // namespace pss
