// x + length z per sample, z = sign(g) / ||sign(g)||_2 or g / ||g||_2; x itself where g is zero.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <functional>
#include <string>

#include "common/output.h"
#include "common/samples.h"
#include "common/vectorize.h"

namespace robustkern {
namespace {

// One thread reads a sample's gradient twice, the second time from its cache, if there are enough
// samples for each thread to stay busy; otherwise all threads share a sample.
constexpr int64_t kSamplesPerThread = 4;

// displace(length, g): the displacement of an element whose gradient is g, in units that make
// displace(1, g) the direction before it is scaled to an L2 norm of one.
template <class T, class Displace>
void perturb_samples(const Tensor& inputs, const Tensor& gradient, double length,
                     const Tensor& output, Displace displace) {
  const Samples<T, 1> gradients(Order::kMemory, {gradient});
  const Samples<T, 2> pairs(Order::kRowMajor, {inputs, gradient});
  const Output<T> outputs(output);

  const auto square = [=](int64_t, int64_t n, const T* tile) {
    return sum_nonnegative<T>(n, [=](int64_t i, auto wide) {
      using W = decltype(wide);
      const W element = displace(W(1), W(tile[i]));
      return element * element;
    });
  };
  const auto move = [=](double squares) {
    return [=](int64_t sample, int64_t begin, int64_t n, const T* input, const T* g) {
      if (squares == 0) {
        outputs.write(sample, begin, n, [=](int64_t i) { return input[i]; });
        return;
      }
      with_factor<T>(length / std::sqrt(squares), [&](auto factor) {
        using W = decltype(factor);
        outputs.write(sample, begin, n, [=](int64_t i) {
          return static_cast<T>(W(input[i]) + displace(factor, W(g[i])));
        });
      });
    };
  };

  if (sample_count(inputs) >= kSamplesPerThread * torch::stable::get_num_threads()) {
    pairs.for_each_sample([&](int64_t sample) {
      pairs.for_each_tile_of(sample, move(gradients.reduce_sample(sample, square, std::plus<>())));
    });
  } else {
    const auto squares = gradients.reduce(square, std::plus<>());
    pairs.for_each_tile([&](int64_t sample, int64_t begin, int64_t n, const T* input, const T* g) {
      move(squares[sample])(sample, begin, n, input, g);
    });
  }
}

Tensor perturb_cpu(const Tensor& inputs, const Tensor& gradient, double length,
                   const std::string& direction) {
  check_batches("perturb", inputs, gradient);
  STD_TORCH_CHECK(direction == "sign" || direction == "gradient",
                  "perturb: direction must be sign or gradient, got ", direction);
  Tensor output = empty_contiguous(inputs);
  dispatch(inputs, [&](auto zero) {
    using T = decltype(zero);
    if (direction == "sign") {
      perturb_samples<T>(inputs, gradient, length, output,
                         [](auto step, auto g) { return times_sign(step, g); });
    } else {
      perturb_samples<T>(inputs, gradient, length, output,
                         [](auto step, auto g) { return step * g; });
    }
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) { m.impl("perturb", TORCH_BOX(&perturb_cpu)); }

}  // namespace robustkern
