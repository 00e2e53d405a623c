// x + length z per sample, z = sign(g) / ||sign(g)||_2 or g / ||g||_2; x itself where g is zero.

#include <torch/csrc/stable/library.h>

#include <string>

#include "common/samples.cuh"

namespace robustkern {
namespace {

struct Step {
  using Combine = Sum;
  static constexpr bool kReadsInputs = true;
  double length;
  bool along_sign;

  // Selections and no branches: every element comes here.
  template <class W>
  __device__ W direction(W g) const {
    const W sign = times_sign(W(1), g);
    return along_sign ? sign : g;
  }

  template <class W>
  __device__ W term(int64_t, W g) const {
    const W z = direction(g);
    return z * z;
  }

  __device__ double factor(int64_t, double squares) const {
    return squares == 0 ? 0 : length / sqrt(squares);
  }

  template <class W>
  __device__ W map(int64_t, W factor, W input, W g) const {
    return factor == 0 ? input : input + factor * direction(g);
  }
};

Tensor perturb_cuda(const Tensor& inputs, const Tensor& gradient, double length,
                    const std::string& direction) {
  check_batches("perturb", inputs, gradient);
  STD_TORCH_CHECK(direction == "sign" || direction == "gradient",
                  "perturb: direction must be sign or gradient, got ", direction);
  const Launcher launch(inputs);
  const Step step{length, direction == "sign"};
  Tensor output;
  dispatch(inputs, [&](auto zero) {
    output = map_samples<true, decltype(zero)>(launch, gradient, inputs, step);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CUDA, m) { m.impl("perturb", TORCH_BOX(&perturb_cuda)); }

}  // namespace robustkern
