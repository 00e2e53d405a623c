// ||g_i||_p per sample for p = 1, 2 and inf, and its derivative: 0 where g_i is 0; for inf shared
// evenly by the largest elements.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#include "common/output.h"
#include "common/per_sample.h"
#include "common/samples.h"
#include "common/vectorize.h"

namespace robustkern {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check_norm(const char* op, const Tensor& gradient, double p) {
  check_batches(op, gradient, gradient);
  STD_TORCH_CHECK(p == 1 || p == 2 || p == kInfinity, op, ": p must be 1, 2 or inf, got ", p);
}

// The bits of a floating-point number without its sign are an integer that orders as |value| does,
// NaN coming last: the maximum needs no conversion, and loses no NaN.
template <class T>
double largest_magnitude(int64_t, int64_t n, const T* tile) {
  using Wide = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  using Bits = std::conditional_t<sizeof(T) == 2, int16_t, Wide>;
  const Bits bits = integer_max<Bits>(n, [=](int64_t i) {
    Bits value;
    std::memcpy(&value, tile + i, sizeof value);
    return static_cast<Bits>(value & std::numeric_limits<Bits>::max());
  });
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

double larger_or_nan(double a, double b) { return a > b || std::isnan(a) ? a : b; }

Tensor gradient_norm_cpu(const Tensor& gradient, double p) {
  check_norm("gradient_norm", gradient, p);
  std::vector<double> norms;
  dispatch(gradient, [&](auto zero) {
    using T = decltype(zero);
    const Samples<T, 1> samples(Order::kMemory, {gradient});
    if (p == kInfinity) {
      norms = samples.reduce(largest_magnitude<T>, larger_or_nan);
    } else if (p == 1) {
      const auto magnitude = [](int64_t, int64_t n, const T* tile) {
        return sum_nonnegative<T>(
            n, [=](int64_t i, auto wide) { return std::abs(decltype(wide)(tile[i])); });
      };
      norms = samples.reduce(magnitude, std::plus<>());
    } else {
      const auto square = [](int64_t, int64_t n, const T* tile) {
        return sum_nonnegative<T>(n, [=](int64_t i, auto wide) {
          const auto g = decltype(wide)(tile[i]);
          return g * g;
        });
      };
      norms = samples.reduce(square, std::plus<>());
      for (double& norm : norms) norm = std::sqrt(norm);
    }
  });
  return to_per_sample_tensor(norms, gradient);
}

// Writes element(factor, norm, g) for every element g, with its sample's factor and norm.
template <class T, class Element>
void map_elements(const Tensor& gradient, const Tensor& output, const std::vector<double>& factors,
                  const std::vector<double>& norms, Element element) {
  const Output<T> elements(output);
  Samples<T, 1>(Order::kRowMajor, {gradient})
      .for_each_tile([&](int64_t sample, int64_t begin, int64_t n, const T* tile) {
        with_factor<T>(factors[sample], [&](auto factor) {
          using W = decltype(factor);
          const W norm = static_cast<W>(norms[sample]);
          elements.write(sample, begin, n, [=](int64_t i) {
            return static_cast<T>(element(factor, norm, W(tile[i])));
          });
        });
      });
}

Tensor gradient_norm_backward_cpu(const Tensor& grad, const Tensor& gradient, const Tensor& norm,
                                  double p) {
  check_norm("gradient_norm_backward", gradient, p);
  auto factors = from_per_sample_tensor("gradient_norm_backward", grad, gradient);
  const auto norms = from_per_sample_tensor("gradient_norm_backward", norm, gradient);
  Tensor output = empty_contiguous(gradient);
  dispatch(gradient, [&](auto zero) {
    using T = decltype(zero);
    if (p == kInfinity) {
      const auto count_largest = [&](int64_t sample, int64_t n, const T* tile) {
        return sum_nonnegative<T>(n, [=, largest = norms[sample]](int64_t i, auto wide) {
          using W = decltype(wide);
          return std::abs(W(tile[i])) == W(largest) ? W(1) : W(0);
        });
      };
      const auto counts =
          Samples<T, 1>(Order::kMemory, {gradient}).reduce(count_largest, std::plus<>());
      for (size_t i = 0; i < factors.size(); ++i) factors[i] /= std::max(counts[i], 1.0);
      map_elements<T>(gradient, output, factors, norms, [](auto factor, auto norm, auto g) {
        return std::abs(g) == norm ? times_sign(factor, g) : 0;
      });
    } else if (p == 1) {
      map_elements<T>(gradient, output, factors, norms,
                      [](auto factor, auto, auto g) { return times_sign(factor, g); });
    } else {
      for (size_t i = 0; i < factors.size(); ++i)
        factors[i] = norms[i] > 0 ? factors[i] / norms[i] : 0;
      map_elements<T>(gradient, output, factors, norms,
                      [](auto factor, auto, auto g) { return factor * g; });
    }
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("gradient_norm", TORCH_BOX(&gradient_norm_cpu));
  m.impl("gradient_norm_backward", TORCH_BOX(&gradient_norm_backward_cpu));
}

}  // namespace robustkern
