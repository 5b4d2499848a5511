// The ops of pss/kernels/robe_bags.py on the CPU: pooled ROBE lookup over all features of a batch, its gradients, and
// the update of M within the backward pass.
//
// What makes it fast: ids are hashed a block ahead, in vectors (located_block.h); the chunk that will be needed some
// chunks later is prefetched while this one is copied; output and gradient, which are larger than the caches, are
// passed over once, M stays in them. No two threads write one element of M, so results repeat to the bit: see
// `add_gradient`.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <cmath>

#include <torch/library.h>

#include "buckets.h"

namespace pss {

constexpr i64 kStreamedBytes = 16 << 20;  // outputs from this size on do not stay in a cache before they are read
constexpr i64 kL2Elements = 1 << 19;      // 2 MiB: one of today's L2 caches, about
constexpr i64 kL3Elements = 4 << 20;      // 16 MiB, likewise; up to here Adagrad sums the whole gradient and updates then
constexpr int kThreadsForBuckets = 4;

// Where most of M is. It decides how its chunks are prefetched, so many of them ahead of the present one.
enum class Home { kL2, kL3, kMemory };

template <class F>
void with_home(i64 elements, F f) {
  if (elements <= kL2Elements) return f(std::integral_constant<Home, Home::kL2>());
  if (elements <= kL3Elements) return f(std::integral_constant<Home, Home::kL3>());
  return f(std::integral_constant<Home, Home::kMemory>());
}

// How many ids ahead of the present one their chunk j is prefetched: as many as have so many chunks.
struct Ahead {
  static constexpr i64 kNear = 16, kFar = 64;
  i64 near, far;  // into L1, into L2

  Ahead(const Plan& plan, i64 near_chunks, i64 far_chunks)
      : near(std::clamp<i64>(near_chunks / plan.chunks, 1, LocatedBlock::kAhead)),
        far(std::clamp<i64>(far_chunks / plan.chunks, 1, LocatedBlock::kAhead)) {}

  // For bags of several ids: of one bag they are read without the other chunks in between.
  static Ahead of_bags(const Plan& plan) { return Ahead(plan, 2 * kNear, 2 * kFar); }
};

// From the location of a chunk: what will be needed some ids later.
template <int Z, Home kHome>
__attribute__((always_inline)) inline void prefetch_ahead(const float* memory, const u32* location, Ahead ahead) {
  if constexpr (kHome != Home::kL2) prefetch<Z, Cache::kL2>(memory + (location[ahead.far] & ~kSign));
  if constexpr (kHome != Home::kL3) prefetch<Z, Cache::kL1>(memory + (location[ahead.near] & ~kSign));
}

// One id a bag, no weights.
template <int Z, Home kHome>
void copy_rows(const Lookup& lookup, const LocatedBlock& block, const float* memory, float* out, bool is_streamed) {
  using V = Vector<kLanes<Z>>;
  const i64 ids = block.size, chunks = lookup.plan.chunks, stride = block.stride();
  const Ahead ahead(lookup.plan, Ahead::kNear, kHome == Home::kL3 ? Ahead::kFar / 2 : Ahead::kFar);
  if (Z == 8 && is_streamed && chunks % 2 == 0) {
    for (i64 x = 0; x < ids; x++) {
      const u32* location = block.chunk(0) + x;
      for (i64 j = 0; j < chunks; j += 2, out += 16, location += 2 * stride) {
        prefetch_ahead<Z, kHome>(memory, location, ahead);
        prefetch_ahead<Z, kHome>(memory, location + stride, ahead);
        stream_pair(out, memory + location[0], memory + location[stride]);
      }
    }
    return;
  }
  for (i64 x = 0; x < ids; x++) {
    const u32* location = block.chunk(0) + x;
    for (i64 j = 0; j < chunks; j++, out += Z, location += stride) {
      prefetch_ahead<Z, kHome>(memory, location, ahead);
      for (int z = 0; z < Z; z += kLanes<Z>) {
        const V part = *(const V*)(memory + *location + z);
        if (is_streamed) stream<kLanes<Z>>(out + z, part);
        else *(V*)(out + z) = part;
      }
    }
  }
}

template <int Z, Home kHome>
void pool_rows(const Lookup& lookup, const LocatedBlock& block, const float* memory, float* out) {
  const Plan& plan = lookup.plan;
  const i64 bags = (block.last_row - block.first_row) * plan.features;
  const Ahead ahead = Ahead::of_bags(plan);
  for (i64 bag = 0; bag < bags; bag++, out += plan.embedding_dim)
    for (i64 j = 0; j < plan.chunks; j++) {
      const u32* location = block.chunk(j);
      float* to = out + j * plan.chunk_size;
      const i64 width = Z ? Z : plan.width_of(j);
      float sum[Z ? Z : 1] = {};
      if constexpr (Z == 0) std::fill_n(to, width, 0.f);
      for (i64 x = block.bag_start[bag]; x < block.bag_start[bag + 1]; x++) {
        prefetch_ahead<Z, kHome>(memory, location + x, ahead);
        const float weight = lookup.is_scaled ? with_sign(block.weight[x], location[x]) : 1.f;
        add_chunk<Z>(Z ? sum : to, memory + (location[x] & ~kSign), weight, width);
      }
      if constexpr (Z > 0) std::memcpy(to, sum, sizeof(sum));
    }
}

// memory[location + z] += scale · weight · gradient
template <int Z, Home kHome>
void add_rows(const Lookup& lookup, const LocatedBlock& block, const float* gradient, float* memory, float scale) {
  const Plan& plan = lookup.plan;
  if (Z > 0 && lookup.has_one_id_per_bag && !lookup.is_scaled) {
    const i64 ids = block.size, stride = block.stride();
    const Ahead ahead(plan, Ahead::kNear, Ahead::kFar);
    return with_constant<1, 2, 4, 8>(plan.chunks, [&](auto constant) {  // unrolled: 3 to 14 % faster; copies are not
      const i64 chunks = constant.value ? constant.value : plan.chunks;
      for (i64 x = 0; x < ids; x++) {
        const u32* location = block.chunk(0) + x;
        for (i64 j = 0; j < chunks; j++, gradient += Z, location += stride) {
          prefetch_ahead<Z, kHome>(memory, location, ahead);
          prefetch_stream<Z>(gradient, j);
          add_chunk<Z>(memory + *location, gradient, scale, Z);
        }
      }
    });
  }
  const Ahead ahead = Ahead::of_bags(plan);
  const i64 bags = (block.last_row - block.first_row) * plan.features;
  for (i64 bag = 0; bag < bags; bag++, gradient += plan.embedding_dim)
    for (i64 j = 0; j < plan.chunks; j++) {
      const u32* location = block.chunk(j);
      const float* from = gradient + j * plan.chunk_size;
      const i64 width = Z ? Z : plan.width_of(j);
      prefetch_stream<Z>(from, j);
      for (i64 x = block.bag_start[bag]; x < block.bag_start[bag + 1]; x++) {
        prefetch_ahead<Z, kHome>(memory, location + x, ahead);
        const float weight = lookup.is_scaled ? scale * with_sign(block.weight[x], location[x]) : scale;
        add_chunk<Z>(memory + (location[x] & ~kSign), from, weight, width);
      }
    }
}

void check_memory(const at::Tensor& memory, const Plan& plan) {
  TORCH_CHECK(memory.scalar_type() == at::kFloat && memory.is_contiguous(), "memory must be float32 and contiguous");
  TORCH_CHECK(memory.numel() == plan.memory_size, "memory has ", memory.numel(), " elements, not ", plan.memory_size);
}

// Gradient of the output (B, features · embedding_dim) as the loops want it.
at::Tensor check_gradient(const at::Tensor& gradient, const Lookup& lookup) {
  const i64 width = lookup.plan.features * lookup.plan.embedding_dim;
  TORCH_CHECK(gradient.dim() == 2 && gradient.size(0) == lookup.rows && gradient.size(1) == width,
              "gradient of shape ", gradient.sizes(), ", not ", lookup.rows, " x ", width);
  return gradient.to(at::kFloat).contiguous();
}

// f(block) over all rows on all threads.
template <class F>
void for_each_block_in_parallel(const Lookup& lookup, F f) {
  const int threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](i64 from, i64 to) {
    for_each_block(lookup, lookup.rows * from / threads, lookup.rows * to / threads, f);
    end_of_stream();  // of this thread's own stores
  });
}

at::Tensor robe_bags(const at::Tensor& memory, const at::Tensor& ids, const at::Tensor& offsets,
                     const std::optional<at::Tensor>& weights, i64 batch_size, at::IntArrayRef features,
                     at::IntArrayRef packed, bool) {
  const Lookup lookup(ids, offsets, weights, batch_size, features, packed);
  const Plan& plan = lookup.plan;
  check_memory(memory, plan);
  const i64 width = plan.features * plan.embedding_dim;
  at::Tensor out = at::empty({batch_size, width}, memory.options());
  const float* from = memory.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  with_constant_size(plan, [&](auto size) {
    constexpr int Z = decltype(size)::value;
    const bool is_aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0;
    const bool is_streamed = is_aligned && Z >= 4 && out.nbytes() >= kStreamedBytes;
    with_home(plan.memory_size, [&](auto home) {
      for_each_block_in_parallel(lookup, [&](const LocatedBlock& block) {
        float* rows = to + block.first_row * width;
        if constexpr (Z > 0)
          if (lookup.has_one_id_per_bag && !lookup.is_scaled)
            return copy_rows<Z, home.value>(lookup, block, from, rows, is_streamed);
        pool_rows<Z, home.value>(lookup, block, from, rows);
      });
    });
  });
  return out;
}

// memory[from, to) += copies[0][from, to) + copies[1][from, to) + ..., in this order, on all threads.
void add_copies(const float* copies, i64 count, float* memory, i64 size) {
  at::parallel_for(0, size, 1 << 14, [=](i64 from, i64 to) {
    for (i64 copy = 0; copy < count; copy++)
      for (i64 e = from; e < to; e++) memory[e] += copies[copy * size + e];
  });
}

// memory += scale · Σ chunks of the gradient, at their locations. Where there is much to add every thread has a copy of
// memory for its rows. Otherwise chunks are divided into buckets, or left to one thread, which is faster than two with
// buckets: 7.6 ms against 11.3 in 100 MB. (Two threads that each add what lies in their half of memory took 8.5.)
void add_gradient(const Lookup& lookup, const float* gradient, float* memory, float scale) {
  const Plan& plan = lookup.plan;
  const int threads = at::get_num_threads();
  const i64 width = plan.features * plan.embedding_dim, size = plan.memory_size;
  with_constant_size(plan, [&](auto constant) {
    constexpr int Z = decltype(constant)::value;
    const auto add = [&](float* to, i64 first_row, i64 last_row) {
      with_home(size, [&](auto home) {
        for_each_block(lookup, first_row, last_row, [&](const LocatedBlock& block) {
          add_rows<Z, home.value>(lookup, block, gradient + block.first_row * width, to, scale);
        });
      });
    };
    const bool has_copies = 2 * size * (threads - 1) <= lookup.visited_ids * plan.embedding_dim;
    if (threads == 1 || (!has_copies && threads < kThreadsForBuckets)) return add(memory, 0, lookup.rows);
    if (has_copies) {
      const at::Tensor copies = at::empty({threads - 1, size}, at::kFloat);
      float* copy = copies.data_ptr<float>();
      at::parallel_for(0, threads, 1, [&](i64 from, i64 to) {
        for (i64 thread = from; thread < to; thread++) {
          float* own = thread == 0 ? memory : std::fill_n(copy + (thread - 1) * size, size, 0.f) - size;
          add(own, lookup.rows * thread / threads, lookup.rows * (thread + 1) / threads);
        }
      });
      return add_copies(copy, threads - 1, memory, size);
    }
    const Buckets buckets(lookup, threads);
    buckets.for_each<NoScratch>([&](i64 bucket, i64 first, i64 elements, NoScratch&) {
      buckets.add<Z>(bucket, gradient, scale, memory + first, first, elements);
    });
  });
}

at::Tensor robe_bags_backward(const at::Tensor& gradient, const at::Tensor& ids, const at::Tensor& offsets,
                              const std::optional<at::Tensor>& weights, i64 batch_size, at::IntArrayRef features,
                              at::IntArrayRef packed) {
  const Lookup lookup(ids, offsets, weights, batch_size, features, packed);
  const at::Tensor from = check_gradient(gradient, lookup);
  at::Tensor memory = at::zeros({lookup.plan.memory_size}, from.options());
  add_gradient(lookup, from.const_data_ptr<float>(), memory.data_ptr<float>(), 1.f);
  return memory;
}

std::tuple<at::Tensor, at::Tensor> robe_bags_backward_sparse(
    const at::Tensor& gradient, const at::Tensor& ids, const at::Tensor& offsets,
    const std::optional<at::Tensor>& weights, i64 batch_size, at::IntArrayRef features, at::IntArrayRef packed) {
  const Lookup lookup(ids, offsets, weights, batch_size, features, packed);
  const at::Tensor from = check_gradient(gradient, lookup);
  struct Part {
    std::vector<i64> slots;
    std::vector<float> values;
  };
  const Buckets buckets(lookup, at::get_num_threads());
  std::vector<Part> parts(buckets.count());
  buckets.for_each<NoScratch>([&](i64 bucket, i64 first, i64 elements, NoScratch&) {
    Part& part = parts[bucket];
    buckets.add_sparse(bucket, from.const_data_ptr<float>(), first, elements, part.slots, part.values);
  });
  i64 touched = 0;
  for (const Part& part : parts) touched += i64(part.slots.size());
  at::Tensor slots = at::empty({touched}, from.options().dtype(at::kLong));
  at::Tensor values = at::empty({touched}, from.options());
  i64* slot = slots.data_ptr<i64>();
  float* value = values.data_ptr<float>();
  for (const Part& part : parts) {
    slot = std::copy(part.slots.begin(), part.slots.end(), slot);
    value = std::copy(part.values.begin(), part.values.end(), value);
  }
  return {slots, values};
}

// Of ids: d loss / d weight = gradient of the bag · row, over the bag's length for mean pooling.
at::Tensor robe_bags_weight_gradient(const at::Tensor& gradient, const at::Tensor& memory, const at::Tensor& ids,
                                     const at::Tensor& offsets, const std::optional<at::Tensor>&, i64 batch_size,
                                     at::IntArrayRef features, at::IntArrayRef packed) {
  const Lookup lookup(ids, offsets, std::nullopt, batch_size, features, packed);
  const Plan& plan = lookup.plan;
  check_memory(memory, plan);
  const at::Tensor from = check_gradient(gradient, lookup);
  at::Tensor out = at::zeros({ids.numel()}, from.options());
  const float *all = from.const_data_ptr<float>(), *m = memory.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  for_each_block_in_parallel(lookup, [&](const LocatedBlock& block) {
    i64 q = 0;
    for (i64 row = block.first_row; row < block.last_row; row++)
      for (i64 f = 0; f < plan.features; f++, q++) {
        const float* bag = all + (row * plan.features + f) * plan.embedding_dim;
        const i64 first = lookup.offset[lookup.features[f] * lookup.rows + row];
        for (u32 x = block.bag_start[q]; x < block.bag_start[q + 1]; x++) {
          float dot = 0.f;
          for (i64 j = 0; j < plan.chunks; j++) {
            const u32 location = block.chunk(j)[x];
            const i64 width = plan.width_of(j);
            float part = 0.f;
            for (i64 z = 0; z < width; z++) part += bag[j * plan.chunk_size + z] * m[(location & ~kSign) + z];
            dot += with_sign(part, location);
          }
          const u32 length = plan.is_mean ? block.bag_start[q + 1] - block.bag_start[q] : 1;
          to[first + x - block.bag_start[q]] += dot / float(length);  // a feature may serve several tables
        }
      }
  });
  return out;
}

void robe_bags_sgd_(at::Tensor& memory, const at::Tensor& gradient, const at::Tensor& ids, const at::Tensor& offsets,
                    const std::optional<at::Tensor>& weights, i64 batch_size, at::IntArrayRef features,
                    at::IntArrayRef packed, double learning_rate) {
  const Lookup lookup(ids, offsets, weights, batch_size, features, packed);
  check_memory(memory, lookup.plan);
  const at::Tensor from = check_gradient(gradient, lookup);
  add_gradient(lookup, from.const_data_ptr<float>(), memory.data_ptr<float>(), -float(learning_rate));
}

// squares += sums², memory -= learning_rate · sums / (√squares + eps), sums = 0. Elements without a gradient keep their
// value: 16 at a time, a line of the cache, are not even read.
void adagrad(float* memory, float* squares, float* sums, i64 elements, float learning_rate, float eps) {
  const auto update = [=](i64 e) {
    const float sum = sums[e], square = squares[e] + sum * sum, step = learning_rate * sum / (std::sqrt(square) + eps);
    squares[e] = square, sums[e] = 0.f;
    memory[e] -= sum == 0.f ? 0.f : step;
  };
  i64 line = 0;
  for (; line + 16 <= elements; line += 16) {
    u32 bits = 0;
    for (i64 e = line; e < line + 16; e++) bits |= std::bit_cast<u32>(sums[e]) & ~kSign;
    if (bits == 0) continue;
#pragma GCC ivdep
    for (i64 e = line; e < line + 16; e++) update(e);
  }
  for (i64 e = line; e < elements; e++) update(e);
}

void robe_bags_adagrad_(at::Tensor& memory, at::Tensor& squares, const at::Tensor& gradient, const at::Tensor& ids,
                        const at::Tensor& offsets, const std::optional<at::Tensor>& weights, i64 batch_size,
                        at::IntArrayRef features, at::IntArrayRef packed, double learning_rate, double eps) {
  const Lookup lookup(ids, offsets, weights, batch_size, features, packed);
  check_memory(memory, lookup.plan);
  check_memory(squares, lookup.plan);
  const at::Tensor from = check_gradient(gradient, lookup);
  float *m = memory.data_ptr<float>(), *s = squares.data_ptr<float>();
  const float rate = float(learning_rate), epsilon = float(eps);
  const i64 size = lookup.plan.memory_size;
  if (size < kL3Elements) {
    at::Tensor sums = at::zeros({size}, from.options());
    float* sum = sums.data_ptr<float>();
    add_gradient(lookup, from.const_data_ptr<float>(), sum, 1.f);
    return at::parallel_for(0, size, 1 << 14, [=](i64 first, i64 last) {
      adagrad(m + first, s + first, sum + first, last - first, rate, epsilon);
    });
  }
  using Sums = std::vector<float>;  // zeros, and zeros again after every bucket
  const Buckets buckets(lookup, at::get_num_threads());
  with_constant_size(lookup.plan, [&](auto constant) {
    constexpr int Z = decltype(constant)::value;
    buckets.for_each<Sums>([&](i64 bucket, i64 first, i64 elements, Sums& sums) {
      buckets.add<Z>(bucket, from.const_data_ptr<float>(), 1.f, sums.data(), first, elements);
      adagrad(m + first, s + first, sums.data(), elements, rate, epsilon);
    });
  });
}

TORCH_LIBRARY_IMPL(pss, CPU, library) {
  library.impl("robe_bags", robe_bags);
  library.impl("robe_bags_backward", robe_bags_backward);
  library.impl("robe_bags_backward_sparse", robe_bags_backward_sparse);
  library.impl("robe_bags_weight_gradient", robe_bags_weight_gradient);
  library.impl("robe_bags_sgd_", robe_bags_sgd_);
  library.impl("robe_bags_adagrad_", robe_bags_adagrad_);
}

}  // namespace pss
