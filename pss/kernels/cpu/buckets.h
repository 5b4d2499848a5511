// The chunks that a batch reads, divided by where in M they are: for gradients that several threads add up, and for
// sums that must be complete before they are used.
//
// Each bucket is a part of M that fits the L2 cache. Within a bucket chunks keep the order of the batch, so every
// element of M gets its addends in one order, whatever the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <atomic>

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

class Buckets {
 public:
  Buckets(const Lookup& lookup, int threads) : lookup_(lookup), threads_(threads) {
    const Plan& plan = lookup.plan;
    while ((i64(1) << shift_) < plan.chunk_size || (plan.memory_size >> shift_) > kMostBuckets) shift_++;
    while (shift_ > kSmallest && (i64(1) << (shift_ - 1)) >= plan.chunk_size && (plan.memory_size >> shift_) < 8 * threads) shift_--;
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
        prefetch<Z, 0>(gradient + (Z ? i64(ahead.source) * Z : i64(ahead.source) / chunks * dim));
        prefetch<Z, 1>(sums + i64(ahead.location & ~kSign) - first);
      }
      const Entry entry = entries_[x];
      const i64 place = i64(entry.location & ~kSign) - first, chunk = Z ? 0 : entry.source % chunks;
      const float* from = gradient + (Z ? i64(entry.source) * Z : entry.source / chunks * dim + chunk * plan.chunk_size);
      const i64 width = Z ? Z : chunk == chunks - 1 ? plan.width_of_last_chunk() : plan.chunk_size;
      const float factor = weights_ ? scale * with_sign(weights_[x], entry.location) : scale;
      if (place >= 0 && place + width <= elements) add_chunk<Z>(sums + place, from, factor, width);
      else {  // it lies across two buckets: this one's share
        const i64 begin = std::max<i64>(0, -place), stop = std::min(width, elements - place);
        if (begin < stop) add_chunk<0>(sums + place + begin, from + begin, factor, stop - begin);
      }
    }
  }

  // marks[e] = 1 for every element first + e that any chunk reads.
  void mark(i64 bucket, uint8_t* marks, i64 first, i64 elements) const {
    const Plan& plan = lookup_.plan;
    for (i64 x = start_[bucket]; x < start_[bucket + 1]; x++) {
      const Entry entry = entries_[x];
      const i64 place = i64(entry.location & ~kSign) - first;
      const bool is_last = entry.source % plan.chunks == plan.chunks - 1;
      const i64 stop = std::min(place + (is_last ? plan.width_of_last_chunk() : plan.chunk_size), elements);
      for (i64 e = std::max<i64>(0, place); e < stop; e++) marks[e] = 1;
    }
  }

 private:
  static constexpr i64 kMostBuckets = 1024, kSmallest = 10, kAhead = 16;

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
