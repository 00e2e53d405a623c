// ||a_i - b_i||_2^2 per sample, and its derivatives 2 grad_i (a_i - b_i) and -2 grad_i (a_i - b_i).

#include <torch/csrc/stable/library.h>

#include <functional>
#include <tuple>

#include "common/output.h"
#include "common/per_sample.h"
#include "common/samples.h"
#include "common/vectorize.h"

namespace robustkern {
namespace {

Tensor gradient_difference_cpu(const Tensor& a, const Tensor& b) {
  check_batches("gradient_difference", a, b);
  std::vector<double> squares;
  dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    const auto square = [](int64_t, int64_t n, const T* a_tile, const T* b_tile) {
      return sum_nonnegative<T>(n, [=](int64_t i, auto wide) {
        using W = decltype(wide);
        const W difference = W(a_tile[i]) - W(b_tile[i]);
        return difference * difference;
      });
    };
    squares = Samples<T, 2>(Order::kMemory, {a, b}).reduce(square, std::plus<>());
  });
  return to_per_sample_tensor(squares, a);
}

std::tuple<Tensor, Tensor> gradient_difference_backward_cpu(const Tensor& grad, const Tensor& a,
                                                            const Tensor& b) {
  check_batches("gradient_difference_backward", a, b);
  const auto grads = from_per_sample_tensor("gradient_difference_backward", grad, a);
  Tensor da = empty_contiguous(a), db = empty_contiguous(a);
  dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    const Output<T> da_elements(da), db_elements(db);
    Samples<T, 2>(Order::kRowMajor, {a, b})
        .for_each_tile(
            [&](int64_t sample, int64_t begin, int64_t n, const T* a_tile, const T* b_tile) {
              const auto scale = static_cast<Wide<T>>(grads[sample]);
              const auto derivative = [=](int64_t i) {
                // The halves keep a difference of finite numbers finite.
                return 4 * (scale * (Wide<T>(a_tile[i]) / 2 - Wide<T>(b_tile[i]) / 2));
              };
              da_elements.write(sample, begin, n, [=](int64_t i) { return T(derivative(i)); });
              db_elements.write(sample, begin, n, [=](int64_t i) { return T(-derivative(i)); });
            });
  });
  return {da, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("gradient_difference", TORCH_BOX(&gradient_difference_cpu));
  m.impl("gradient_difference_backward", TORCH_BOX(&gradient_difference_backward_cpu));
}

}  // namespace robustkern
