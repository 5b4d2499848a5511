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

// Two chunks of 8, one after the other, in one store where the machine has such.
inline void stream_pair(float* to, const float* first, const float* second) {
  const Vector<8> low = *(const Vector<8>*)first, high = *(const Vector<8>*)second;
#if defined(__AVX512F__)
  const __m512d pair = _mm512_castpd256_pd512((__m256d)low);
  _mm512_stream_pd((double*)to, _mm512_insertf64x4(pair, (__m256d)high, 1));
#else
  stream<8>(to, low), stream<8>(to + 8, high);
#endif
}

inline void end_of_stream() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// A chunk of M that will be needed soon; Z = 0: any width. Into the L1 cache, to be written maybe; or only into L2, where
// many more lines can be on their way.
//
// Always inline: GCC 12 takes a function that only prefetches for one without effect, and drops its calls.
enum class Cache { kL1, kL2 };
template <int Z, Cache kCache>
__attribute__((always_inline)) inline void prefetch(const float* chunk) {
  constexpr int kWrite = kCache == Cache::kL1, kLocality = kCache == Cache::kL1 ? 3 : 2;
  for (int z = 0; z < (Z ? Z : 1); z += 16) __builtin_prefetch(chunk + z, kWrite, kLocality);
  if constexpr (Z > 1) __builtin_prefetch(chunk + Z - 1, kWrite, kLocality);
}

// Ahead of chunk j of an array that is read from its begin to its end, once: the machine foresees it, but has too little
// of a lead while M is being read as well.
template <int Z>
__attribute__((always_inline)) inline void prefetch_stream(const float* chunk, i64 j) {
  constexpr i64 kLead = 1024;  // 64 lines of the cache
  if (Z >= 16 || j % (16 / std::max(1, Z)) == 0)
    for (int z = 0; z < std::max(1, Z); z += 16) __builtin_prefetch(chunk + z + kLead, 0, 2);
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

// Calls f with the value as a constant if it is one of kKnown, with 0 if not.
template <int... kKnown, class F>
inline void with_constant(i64 value, F f) {
  const bool is_known = ((value == kKnown && (f(std::integral_constant<int, kKnown>()), true)) || ...);
  if (!is_known) f(std::integral_constant<int, 0>());
}

// Calls f with Z as a constant where chunks are of one of these sizes, with 0 for any other.
template <class F>
inline void with_constant_size(const Plan& plan, F f) {
  const bool is_even = plan.width_of(plan.chunks - 1) == plan.chunk_size;
  with_constant<1, 2, 4, 8, 16, 32, 64, 128>(is_even ? plan.chunk_size : 0, f);
}

}  // namespace pss
