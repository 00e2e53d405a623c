// ||g_i||_p per sample for p = 1, 2 and inf, and its derivative: 0 where g_i is 0; for inf shared
// evenly by the largest elements.

#include <torch/csrc/stable/library.h>

#include <limits>

#include "common/per_sample.h"
#include "common/samples.cuh"

namespace robustkern {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class W>
__device__ W magnitude(W g) {
  return g < 0 ? -g : g;
}

struct Maximum {
  using Combine = LargerOrNan;

  template <class W>
  __device__ W term(int64_t, W g) const {
    return magnitude(g);
  }

  __device__ double factor(int64_t, double total) const { return total; }
};

struct SumOfPowers {
  using Combine = Sum;
  bool squares;

  template <class W>
  __device__ W term(int64_t, W g) const {
    return magnitude(g) * (squares ? magnitude(g) : W(1));
  }

  __device__ double factor(int64_t, double total) const { return squares ? sqrt(total) : total; }
};

void check_norm(const char* op, const Tensor& gradient, double p) {
  check_batches(op, gradient, gradient);
  STD_TORCH_CHECK(p == 1 || p == 2 || p == kInfinity, op, ": p must be 1, 2 or inf, got ", p);
}

Tensor gradient_norm_cuda(Tensor gradient, double p) {
  check_norm("gradient_norm", gradient, p);
  const Launcher launch(gradient);
  const int64_t count = sample_count(gradient);
  Tensor norms = torch::stable::new_empty(gradient, {&count, 1}, per_sample_dtype(gradient));
  dispatch(gradient, [&](auto zero) {
    using T = decltype(zero);
    const auto elements = elements_of<T>(gradient, ordered_dimensions(gradient, Order::kMemory));
    auto* const data = static_cast<Wide<T>*>(norms.mutable_data_ptr());
    if (p == kInfinity) {
      find_factors(launch, gradient, elements, Maximum(), data);
    } else {
      find_factors(launch, gradient, elements, SumOfPowers{p == 2}, data);
    }
  });
  return norms;
}

template <class W>
struct PerSample {
  explicit PerSample(const Tensor& tensor)
      : data(static_cast<const W*>(tensor.const_data_ptr())), stride(tensor.stride(0)) {}

  __device__ W operator[](int64_t sample) const { return data[sample * stride]; }

  const W* data;
  int64_t stride;
};

template <class W>
struct SumDerivative {
  static constexpr bool kReadsInputs = false;
  PerSample<W> grads, norms;
  bool squares;

  __device__ double factor(int64_t sample, double) const {
    const double grad = grads[sample];
    if (!squares) return grad;
    return norms[sample] > 0 ? grad / norms[sample] : 0;
  }

  __device__ W map(int64_t, W factor, W, W g) const {
    const W sign = times_sign(W(1), g);
    return factor * (squares ? g : sign);
  }
};

template <class W>
struct MaximumDerivative {
  using Combine = Sum;
  static constexpr bool kReadsInputs = false;
  PerSample<W> grads, norms;

  // How many elements are the largest.
  template <class V>
  __device__ V term(int64_t sample, V g) const {
    return magnitude(g) == static_cast<V>(norms[sample]) ? V(1) : V(0);
  }

  __device__ double factor(int64_t sample, double largest) const {
    return largest > 1 ? grads[sample] / largest : grads[sample];
  }

  __device__ W map(int64_t sample, W factor, W, W g) const {
    return magnitude(g) == norms[sample] ? times_sign(factor, g) : W(0);
  }
};

Tensor gradient_norm_backward_cuda(const Tensor& grad, const Tensor& gradient, const Tensor& norm,
                                   double p) {
  check_norm("gradient_norm_backward", gradient, p);
  check_per_sample("gradient_norm_backward", grad, gradient);
  check_per_sample("gradient_norm_backward", norm, gradient);
  const Launcher launch(gradient);
  Tensor output;
  dispatch(gradient, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const PerSample<W> grads(grad), norms(norm);
    if (p == kInfinity) {
      const MaximumDerivative<W> derivative{grads, norms};
      output = map_samples<true, T>(launch, gradient, gradient, derivative);
    } else {
      const SumDerivative<W> derivative{grads, norms, p == 2};
      output = map_samples<false, T>(launch, gradient, gradient, derivative);
    }
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CUDA, m) {
  m.impl("gradient_norm", TORCH_BOX(&gradient_norm_cuda));
  m.impl("gradient_norm_backward", TORCH_BOX(&gradient_norm_backward_cuda));
}

}  // namespace robustkern
