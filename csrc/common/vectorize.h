// Loops over flat arrays, compiled once for each level of the instruction set.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

// A wheel must run on any x86-64, yet use what the machine has: the loader picks one of the clones.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define ROBUSTKERN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ROBUSTKERN_CLONES
#endif

namespace robustkern {

template <class T, class Value>
ROBUSTKERN_CLONES void fill(int64_t n, T* to, Value value) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = value(i);
}

// The same past the caches, which would first read the memory that is about to be overwritten.
template <class T, class Value>
ROBUSTKERN_CLONES void stream(int64_t n, T* to, Value value) {
  int64_t i = 0;
#ifdef __SSE2__
  constexpr int64_t kLineBytes = 64, kLine = kLineBytes / sizeof(T);
  for (; i < n && reinterpret_cast<std::uintptr_t>(to + i) % kLineBytes != 0; ++i) to[i] = value(i);
  for (; i + kLine <= n; i += kLine) {
    alignas(kLineBytes) T line[kLine];
#pragma omp simd
    for (int64_t lane = 0; lane < kLine; ++lane) line[lane] = value(i + lane);
    __m128i parts[kLineBytes / sizeof(__m128i)];
    std::memcpy(parts, line, kLineBytes);
    auto* target = reinterpret_cast<__m128i*>(to + i);
    for (const __m128i part : parts) _mm_stream_si128(target++, part);
  }
  _mm_sfence();  // once this thread is done, others may read what it wrote
#endif
  for (; i < n; ++i) to[i] = value(i);
}

// The sum of term(i), computed in W. The lanes are summed side by side, which the compiler turns
// into vectors (one long sum would bind it to the order of additions); four groups of them keep the
// adders busy.
template <class W, class Term>
ROBUSTKERN_CLONES W sum_in(int64_t n, Term term) {
  constexpr int kLanes = 16;
  W sums0[kLanes] = {}, sums1[kLanes] = {}, sums2[kLanes] = {}, sums3[kLanes] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      sums0[lane] += term(i + lane);
      sums1[lane] += term(i + kLanes + lane);
      sums2[lane] += term(i + 2 * kLanes + lane);
      sums3[lane] += term(i + 3 * kLanes + lane);
    }
  }
  W total = 0;
  for (; i < n; ++i) total += term(i);
  for (int lane = 0; lane < kLanes; ++lane) {
    total += (sums0[lane] + sums1[lane]) + (sums2[lane] + sums3[lane]);
  }
  return total;
}

template <class Term>
double sum(int64_t n, Term term) {
  return sum_in<double>(n, term);
}

// The sum of term(i, W()) >= 0 over the elements of a tile of dtype T, with W float where that is
// sure to lose nothing, neither to a square above the largest float nor to squares below the
// smallest; else double, at half the speed.
template <class T, class Term>
double sum_nonnegative(int64_t n, Term term) {
  constexpr float kSmallest = 1e-25f, kLargest = 1e38f;
  if constexpr (!std::is_same_v<T, double>) {
    const float total = sum_in<float>(n, [=](int64_t i) { return term(i, float()); });
    if (total > kSmallest && total < kLargest) return total;
  }
  return sum_in<double>(n, [=](int64_t i) { return term(i, double()); });
}

template <class Integer, class Term>
ROBUSTKERN_CLONES Integer integer_max(int64_t n, Term term) {
  Integer largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Integer value = term(i);
    largest = value > largest ? value : largest;
  }
  return largest;
}

}  // namespace robustkern
