// Fast Fourier transforms of many signals side by side, one in each lane of a vector.
//
// A library's transform of so short a signal spends most of its time outside its arithmetic. Here a
// vector holds one element of kLanes signals, so that every step is one instruction for all of
// them, whatever the length, and nothing is shuffled.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/vectorize.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses the border of a library
#endif

#define ROBUSTKERN_INLINE inline __attribute__((always_inline))

namespace robustkern {
namespace {  // clones have internal linkage

// That of AVX2. The compiler splits it for narrower registers without loss, but wider ones it
// splits badly; AVX-512 machines would gain a quarter from 64.
constexpr int64_t kVectorBytes = 32;
template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
struct alignas(kVectorBytes) Complex {
  Vector<T> re, im;
};

template <class T>
ROBUSTKERN_INLINE Complex<T> operator+(const Complex<T>& a, const Complex<T>& b) {
  return {a.re + b.re, a.im + b.im};
}

template <class T>
ROBUSTKERN_INLINE Complex<T> operator-(const Complex<T>& a, const Complex<T>& b) {
  return {a.re - b.re, a.im - b.im};
}

template <class T>
ROBUSTKERN_INLINE Complex<T> operator*(const Complex<T>& a, T scale) {
  return {a.re * scale, a.im * scale};
}

template <class T>
ROBUSTKERN_INLINE Complex<T> times(const Complex<T>& a, T re, T im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}

template <class T>
ROBUSTKERN_INLINE Complex<T> times_minus_i(const Complex<T>& a) {
  return {a.im, -a.re};
}

template <class T>
ROBUSTKERN_INLINE Complex<T> conjugate(const Complex<T>& a) {
  return {a.re, -a.im};
}

// The discrete Fourier transform of kRadix numbers in place; with kHalf the second half of them is
// zero and never looked at.
template <int kRadix, bool kHalf, class T>
ROBUSTKERN_INLINE void butterfly(Complex<T>* v) {
  if constexpr (kRadix == 2) {
    const Complex<T> a = v[0];
    if constexpr (kHalf) {
      v[1] = a;
    } else {
      v[0] = a + v[1];
      v[1] = a - v[1];
    }
  } else if constexpr (kRadix == 3) {
    const Complex<T> sum = v[1] + v[2];
    const Complex<T> difference = times_minus_i(v[1] - v[2]) * T(0.866025403784438646763723);
    const Complex<T> middle = v[0] - sum * T(0.5);
    v[0] = v[0] + sum;
    v[1] = middle + difference;
    v[2] = middle - difference;
  } else if constexpr (kRadix == 4) {
    Complex<T> even[2] = {v[0], v[2]}, odd[2] = {v[1], v[3]};
    butterfly<2, kHalf>(even);
    butterfly<2, kHalf>(odd);
    odd[1] = times_minus_i(odd[1]);
    for (int k = 0; k < 2; ++k) {
      v[k] = even[k] + odd[k];
      v[k + 2] = even[k] - odd[k];
    }
  } else if constexpr (kRadix == 5) {
    constexpr T c1 = T(0.309016994374947424102293), c2 = T(-0.809016994374947424102293);
    constexpr T s1 = T(0.951056516295153572116439), s2 = T(0.587785252292473129168706);
    const Complex<T> a = v[1] + v[4], b = v[2] + v[3];
    const Complex<T> c = times_minus_i(v[1] - v[4]), d = times_minus_i(v[2] - v[3]);
    const Complex<T> e = v[0] + a * c1 + b * c2, f = v[0] + a * c2 + b * c1;
    const Complex<T> g = c * s1 + d * s2, h = c * s2 - d * s1;
    v[0] = v[0] + a + b;
    v[1] = e + g;
    v[2] = f + h;
    v[3] = f - h;
    v[4] = e - g;
  } else {
    static_assert(kRadix == 8);
    constexpr T root = T(0.707106781186547524400844);
    Complex<T> even[4] = {v[0], v[2], v[4], v[6]}, odd[4] = {v[1], v[3], v[5], v[7]};
    butterfly<4, kHalf>(even);
    butterfly<4, kHalf>(odd);
    odd[1] = Complex<T>{odd[1].re + odd[1].im, odd[1].im - odd[1].re} * root;
    odd[2] = times_minus_i(odd[2]);
    odd[3] = Complex<T>{odd[3].im - odd[3].re, -odd[3].re - odd[3].im} * root;
    for (int k = 0; k < 4; ++k) {
      v[k] = even[k] + odd[k];
      v[k + 4] = even[k] - odd[k];
    }
  }
}

// The radices of an even length's transform, even ones first; none for a length that has others.
inline std::vector<int> radices_of(int64_t length) {
  std::vector<int> radices;
  int twos = 0;
  for (; length % 2 == 0; length /= 2) ++twos;
  while (twos > 0) {
    const int power = twos == 1 ? 1 : twos % 3 == 0 || twos == 5 || twos > 6 ? 3 : 2;
    radices.push_back(1 << power);
    twos -= power;
  }
  for (int radix : {5, 3}) {
    for (; length % radix == 0; length /= radix) radices.push_back(radix);
  }
  return length == 1 ? radices : std::vector<int>();
}

// The even length, with no prime factor above 5, that is transformed fastest among those that keep
// the displacements -(size-1), ..., size-1 apart. Time goes by elements and passes, whatever the
// radix, and what surrounds a transform takes that of about two passes.
inline int64_t transform_length(int64_t size) {
  int64_t best = 0, least = 0;
  for (int64_t length = 2 * size; length <= 4 * size; length += 2) {
    const int64_t passes = static_cast<int64_t>(radices_of(length).size());
    const int64_t cost = length * (passes + 2);
    if (passes && (!best || cost < least)) {
      best = length;
      least = cost;
    }
  }
  return best;
}

// The passes of a transform of even length, after Stockham: no bit reversal, each pass from one
// array to another. An even radix comes first forwards and last backwards, where half is zero or
// unwanted.
template <class T>
class Plan {
 public:
  struct Pass {
    int radix;
    int64_t butterflies, stride;
    std::vector<T> twiddles;  // (radix - 1) complex numbers for each butterfly
  };

  explicit Plan(int64_t length) : length(length) {
    std::vector<int> radices = radices_of(length);
    forward = passes(radices);
    std::reverse(radices.begin(), radices.end());
    backward = passes(radices);
  }

  int64_t length;
  std::vector<Pass> forward, backward;

 private:
  std::vector<Pass> passes(const std::vector<int>& radices) const {
    std::vector<Pass> result;
    int64_t rest = length, stride = 1;
    for (int radix : radices) {
      Pass pass{radix, rest / radix, stride, {}};
      for (int64_t p = 0; p < pass.butterflies; ++p) {
        for (int r = 1; r < radix; ++r) {
          const double angle = -2 * M_PI * static_cast<double>(p * r) / static_cast<double>(rest);
          pass.twiddles.push_back(static_cast<T>(std::cos(angle)));
          pass.twiddles.push_back(static_cast<T>(std::sin(angle)));
        }
      }
      result.push_back(std::move(pass));
      rest /= radix;
      stride *= radix;
    }
    return result;
  }
};

// Elements of an array that lie `stride` apart.
template <class T>
struct Signal {
  Complex<T>* data;
  int64_t stride;
};

// Backwards, real and imaginary parts change places on the way in and on the way out.
template <int kRadix, bool kBackward, bool kHalfIn, bool kHalfOut, class T>
ROBUSTKERN_INLINE void run_pass(const typename Plan<T>::Pass& pass, Signal<T> in, Signal<T> out) {
  const int64_t butterflies = pass.butterflies, stride = pass.stride;
  for (int64_t p = 0; p < butterflies; ++p) {
    const T* twiddles = pass.twiddles.data() + p * (kRadix - 1) * 2;
    for (int64_t q = 0; q < stride; ++q) {
      Complex<T> v[kRadix];
      for (int r = 0; r < (kHalfIn ? kRadix / 2 : kRadix); ++r) {
        const Complex<T>& z = in.data[(q + stride * (p + butterflies * r)) * in.stride];
        v[r] = kBackward ? Complex<T>{z.im, z.re} : z;
      }
      butterfly<kRadix, kHalfIn>(v);
      for (int r = 0; r < (kHalfOut ? kRadix / 2 : kRadix); ++r) {
        if (p && r) v[r] = times(v[r], twiddles[2 * r - 2], twiddles[2 * r - 1]);
        const Complex<T>& z = v[r];
        out.data[(q + stride * (kRadix * p + r)) * out.stride] =
            kBackward ? Complex<T>{z.im, z.re} : z;
      }
    }
  }
}

template <bool kBackward, bool kHalfIn, bool kHalfOut, class T>
ROBUSTKERN_INLINE void run_pass(const typename Plan<T>::Pass& pass, Signal<T> in, Signal<T> out) {
  switch (pass.radix) {
    case 2:
      return run_pass<2, kBackward, kHalfIn, kHalfOut>(pass, in, out);
    case 4:
      return run_pass<4, kBackward, kHalfIn, kHalfOut>(pass, in, out);
    case 8:
      return run_pass<8, kBackward, kHalfIn, kHalfOut>(pass, in, out);
    default:
      if constexpr (!kHalfIn && !kHalfOut) {
        if (pass.radix == 3) return run_pass<3, kBackward, false, false>(pass, in, out);
        return run_pass<5, kBackward, false, false>(pass, in, out);
      }
  }
}

// The transform of kLanes signals, not scaled; `out` may be `in`, and scratch holds two signals.
// kHalf: the second half of the input (forwards) or of the output (backwards) is zero or unwanted
// and is not touched.
template <class T, bool kBackward, bool kHalf>
ROBUSTKERN_CLONES void transform(const Plan<T>& plan, Signal<T> in, Signal<T> out,
                                 Complex<T>* scratch) {
  const auto& passes = kBackward ? plan.backward : plan.forward;
  const size_t last = passes.size() - 1;
  for (size_t i = 0; i <= last; ++i) {
    const Signal<T> to = i == last ? out : Signal<T>{scratch + (i % 2) * plan.length, 1};
    if (kHalf && !kBackward && i == 0) {
      run_pass<kBackward, true, false>(passes[i], in, to);
    } else if (kHalf && kBackward && i == last) {
      run_pass<kBackward, false, true>(passes[i], in, to);
    } else {
      run_pass<kBackward, false, false>(passes[i], in, to);
    }
    in = to;
  }
}

}  // namespace
}  // namespace robustkern
