// Sigma g: per frequency, a C x C matrix times the channels of a pair of samples.

#include <torch/csrc/stable/library.h>

#include "common/dense.h"
#include "common/images.h"
#include "common/output.h"
#include "common/spectral.h"
#include "common/stencil.h"

namespace robustkern {
namespace {

// One band and its mirror, in place: (2, C, x.length). kChannels is C, or 0 where C is known only
// here.
template <class T, int64_t kChannels>
ROBUSTKERN_CLONES void multiply_band(const Grid<T>& grid, const Complex<T>* matrices,
                                     Complex<T>* spectrum, Complex<T>* column) {
  const int64_t channels = kChannels ? kChannels : grid.channels, nx = grid.x.length;
  Complex<T>* const mirror = spectrum + channels * nx;
  for (int64_t k = 0; k < nx; ++k, matrices += channels * channels) {
    // Inlined, for a function of its own would not be cloned.
    const auto multiply = [&](Complex<T>* z, T sign) __attribute__((always_inline)) {
      Complex<T> registers[kChannels ? kChannels : 1];
      Complex<T>* const in = kChannels ? registers : column;
      for (int64_t c = 0; c < channels; ++c) in[c] = z[c * nx];
      for (int64_t c = 0; c < channels; ++c) {
        Complex<T> sum{};
        for (int64_t from = 0; from < channels; ++from) {
          const Complex<T>& matrix = matrices[c * channels + from];
          const Vector<T> imaginary = matrix.im * sign;
          sum.re += matrix.re * in[from].re - imaginary * in[from].im;
          sum.im += matrix.re * in[from].im + imaginary * in[from].re;
        }
        z[c * nx] = sum;
      }
    };
    multiply(spectrum + k, T(1));
    multiply(mirror + (k ? nx - k : 0), T(-1));
  }
}

template <class T>
void multiply(const Grid<T>& grid, const Complex<T>* matrices, Complex<T>* spectrum,
              Complex<T>* column) {
  switch (grid.channels) {
    case 1:
      return multiply_band<T, 1>(grid, matrices, spectrum, column);
    case 3:
      return multiply_band<T, 3>(grid, matrices, spectrum, column);
    default:
      return multiply_band<T, 0>(grid, matrices, spectrum, column);
  }
}

template <class T>
void covariance_product(const Grid<T>& grid, const T* gradient, int64_t samples,
                        const Complex<T>* matrices, T* product) {
  const int64_t nx = grid.x.length, size = grid.channels * grid.height * grid.width;
  parallel_if_many((samples + 1) / 2, [&](int64_t begin, int64_t end) {
    const auto work = make_buffer<T>(work_size(grid));
    const auto one_pair = [&](int64_t sample, Pair<const T> given) {
      const Pair<const T> pair = normalize(grid, given);
      transform_columns(grid, pair, work.get());
      torch::stable::parallel_for(0, grid.bands, 1, [&](int64_t first, int64_t last) {
        const auto buffer = make_buffer<T>((2 * nx + 1) * grid.channels + 2 * nx);
        const auto spectrum = buffer.get(), column = spectrum + 2 * nx * grid.channels;
        const auto scratch = column + grid.channels;
        for (int64_t band = first; band < last; ++band) {
          transform_band(grid, work.get(), band, spectrum, scratch);
          multiply(grid, matrices + band * nx * grid.channels * grid.channels, spectrum, column);
          untransform_band(grid, spectrum, band, work.get(), scratch);
        }
      });
      T *const first = product + sample * size, *const second = first + size;
      untransform_columns(grid, work.get(),
                          {pair.first ? first : nullptr, pair.second ? second : nullptr,
                           pair.first_scale, pair.second_scale});
      if (!pair.first) std::fill_n(first, size, pair.first_scale);
      if (given.second && !pair.second) std::fill_n(second, size, pair.second_scale);
    };
    for_each_pair(grid, gradient, 2 * begin, std::min(2 * end, samples), one_pair);
  });
}

Tensor covariance_product_cpu(const Tensor& gradient, const Tensor& covariance) {
  check_covariance("covariance_product", gradient, covariance);
  const ScalarType dtype = per_sample_dtype(gradient);
  const Tensor g = contiguous_as(gradient, dtype), given = contiguous_as(covariance, dtype);
  Tensor product;
  dispatch_sums(g, [&](auto zero) {
    using T = decltype(zero);
    if (stencil_pays(g, given, false)) {
      product = empty_contiguous(g);
      auto* const to = static_cast<T*>(product.mutable_data_ptr());
      const int64_t channels = g.size(1), pixels = g.size(2) * g.size(3);
      Stencil<T>(g, given).for_each_channel(
          [&](int64_t sample, int64_t channel, const T*, const T* pixel) {
            std::copy_n(pixel, pixels, to + (sample * channels + channel) * pixels);
          });
      return;
    }
    const Tensor k = contiguous_as(at_all_displacements(given, g), dtype);
    if (sample_elements(g) <= kDenseProduct) {
      product = torch::stable::view(dense_product<T>(g, k), g.sizes());
      return;
    }
    product = empty_contiguous(g);
    const Grid<T> grid(g.size(1), g.size(2), g.size(3));
    const auto spectrum = covariance_spectrum(grid, static_cast<const T*>(k.const_data_ptr()));
    covariance_product(grid, static_cast<const T*>(g.const_data_ptr()), g.size(0), spectrum.get(),
                       static_cast<T*>(product.mutable_data_ptr()));
  });
  return contiguous_as(product, gradient.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("covariance_product", TORCH_BOX(&covariance_product_cpu));
}

}  // namespace robustkern
