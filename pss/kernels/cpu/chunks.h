// Arithmetic on one chunk: Z consecutive floats, as vectors of what the machine has.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE__)
#include <immintrin.h>
#endif

#include <bit>
#include <cstring>

#include "located_block.h"

namespace pss {

template <int N>
struct VectorOf {
  using type __attribute__((vector_size(4 * N), aligned(4), may_alias)) = float;
};
template <>
struct VectorOf<1> {
  using type = float;
};
template <int N>
using Vector = typename VectorOf<N>::type;

template <int Z>
constexpr int kLanes = Z > 16 ? 16 : Z;

// Past the caches; to must be aligned to the vector.
template <int N>
inline void stream(float* to, Vector<N> value) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return _mm512_stream_ps(to, (__m512)value);
#endif
#if defined(__AVX__)
  if constexpr (N == 8) return _mm256_stream_ps(to, (__m256)value);
#endif
#if defined(__SSE__)
  if constexpr (N == 4) return _mm_stream_ps(to, (__m128)value);
#endif
  *(Vector<N>*)to = value;
}

inline void end_of_stream() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// A chunk of M that will be needed soon; Z = 0: any width. Into the L1 cache, to be written maybe. Or, where it comes
// from far, only into L2: many more lines can be on their way there, which took a third off a lookup in 100 MB.
template <int Z, bool kIsFar>
inline void prefetch(const float* chunk) {
  const auto fetch = [](const float* place) {
    if constexpr (kIsFar) __builtin_prefetch(place, 0, 2);
    else __builtin_prefetch(place, 1, 3);
  };
  for (int z = 0; z < (Z ? Z : 1); z += 16) fetch(chunk + z);
  if constexpr (Z > 1) fetch(chunk + Z - 1);
}

// to += from · scale over Z floats, or over `width` where Z = 0.
template <int Z>
inline void add_chunk(float* to, const float* from, float scale, i64 width) {
  if constexpr (Z == 0) {
    for (i64 z = 0; z < width; z++) to[z] += from[z] * scale;
  } else {
    using V = Vector<kLanes<Z>>;
    for (int z = 0; z < Z; z += kLanes<Z>) *(V*)(to + z) += *(const V*)(from + z) * scale;
  }
}

// The weight of an id with the sign that is in its location.
inline float with_sign(float weight, u32 location) {
  return std::bit_cast<float>(std::bit_cast<u32>(weight) ^ (location & kSign));
}

// Calls f with Z as a constant where chunks are of one of these sizes, with 0 for any other.
template <class F>
inline void with_constant_size(const Plan& plan, F f) {
  const bool is_even = plan.width_of(plan.chunks - 1) == plan.chunk_size;
  switch (is_even ? plan.chunk_size : 0) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 4: return f(std::integral_constant<int, 4>());
    case 8: return f(std::integral_constant<int, 8>());
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    case 64: return f(std::integral_constant<int, 64>());
    case 128: return f(std::integral_constant<int, 128>());
    default: return f(std::integral_constant<int, 0>());
  }
}

}  // namespace pss
