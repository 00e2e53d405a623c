// g^T Sigma g by Parseval: summed where the spectrum is, with no way back.

#include <torch/csrc/stable/library.h>

#include "common/dense.h"
#include "common/images.h"
#include "common/spectral.h"
#include "common/stencil.h"

namespace robustkern {
namespace {

template <class T>
ROBUSTKERN_INLINE double lane_sum(const Vector<T>& v) {
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += v[lane];
  return sum;
}

// What one band and its mirror, (2, C, x.length), add to the forms of a pair of samples. Sigma
// counts by its symmetric part alone, which is a Hermitian matrix at every frequency.
template <class T, int64_t kChannels>
ROBUSTKERN_CLONES void reduce_band(const Grid<T>& grid, const Complex<T>* matrices,
                                   const Complex<T>* spectrum, Complex<T>* columns, double* forms) {
  const int64_t channels = kChannels ? kChannels : grid.channels, nx = grid.x.length;
  const Complex<T>* const mirror = spectrum + channels * nx;
  Vector<T> totals[2] = {};
  for (int64_t k = 0; k < nx; ++k, matrices += channels * channels) {
    Complex<T> registers[kChannels ? 2 * kChannels : 1];
    Complex<T>* const x = kChannels ? registers : columns;
    Complex<T>* const y = x + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const Complex<T> z = spectrum[c * nx + k];
      const Complex<T> mirrored = conjugate(mirror[c * nx + (k ? nx - k : 0)]);
      x[c] = z + mirrored;
      y[c] = z - mirrored;  // up to a factor i, which a quadratic form does not see
    }
    for (int64_t c = 0; c < channels; ++c) {
      const Vector<T> variance = matrices[c * channels + c].re;
      totals[0] += variance * (x[c].re * x[c].re + x[c].im * x[c].im);
      totals[1] += variance * (y[c].re * y[c].re + y[c].im * y[c].im);
      for (int64_t d = c + 1; d < channels; ++d) {
        const Complex<T> both = matrices[c * channels + d] + conjugate(matrices[d * channels + c]);
        totals[0] += both.re * (x[c].re * x[d].re + x[c].im * x[d].im) -
                     both.im * (x[c].re * x[d].im - x[c].im * x[d].re);
        totals[1] += both.re * (y[c].re * y[d].re + y[c].im * y[d].im) -
                     both.im * (y[c].re * y[d].im - y[c].im * y[d].re);
      }
    }
  }
  // Twice for the mirror's frequencies, a quarter for the sums of two above.
  for (int sample = 0; sample < 2; ++sample) forms[sample] = lane_sum<T>(totals[sample]) / 2;
}

template <class T>
void reduce(const Grid<T>& grid, const Complex<T>* matrices, const Complex<T>* spectrum,
            Complex<T>* columns, double* forms) {
  switch (grid.channels) {
    case 1:
      return reduce_band<T, 1>(grid, matrices, spectrum, columns, forms);
    case 3:
      return reduce_band<T, 3>(grid, matrices, spectrum, columns, forms);
    default:
      return reduce_band<T, 0>(grid, matrices, spectrum, columns, forms);
  }
}

template <class T>
std::vector<double> spectral_form(const Grid<T>& grid, const T* gradient, int64_t samples,
                                  const Complex<T>* matrices) {
  const int64_t nx = grid.x.length, channels = grid.channels;
  std::vector<double> forms(samples);
  parallel_if_many((samples + 1) / 2, [&](int64_t begin, int64_t end) {
    const auto work = make_buffer<T>(work_size(grid));
    std::vector<double> parts(2 * grid.bands);
    const auto one_pair = [&](int64_t sample, Pair<const T> given) {
      const Pair<const T> pair = normalize(grid, given);
      transform_columns(grid, pair, work.get());
      torch::stable::parallel_for(0, grid.bands, 1, [&](int64_t first, int64_t last) {
        const auto buffer = make_buffer<T>(2 * (nx + 1) * channels + 2 * nx);
        const auto spectrum = buffer.get(), columns = spectrum + 2 * nx * channels;
        for (int64_t band = first; band < last; ++band) {
          transform_band(grid, work.get(), band, spectrum, columns + 2 * channels);
          reduce(grid, matrices + band * nx * channels * channels, spectrum, columns,
                 parts.data() + 2 * band);
        }
      });
      double sums[2] = {};
      for (int64_t part = 0; part < 2 * grid.bands; ++part) sums[part % 2] += parts[part];
      const double scales[2] = {pair.first_scale, pair.second_scale};
      for (int i = 0; i < (given.second ? 2 : 1); ++i) {
        forms[sample + i] = scales[i] > 0 ? sums[i] / (scales[i] * scales[i]) : scales[i];
      }
    };
    for_each_pair(grid, gradient, 2 * begin, std::min(2 * end, samples), one_pair);
  });
  return forms;
}

// In double: products of what float32 holds may lie beyond it.
template <class T>
ROBUSTKERN_CLONES double dot(const T* a, const T* b, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

template <class T>
std::vector<double> dense_form(const Tensor& gradient, const Tensor& covariance) {
  const Tensor product = dense_product<T>(gradient, covariance);
  const int64_t size = product.size(1);
  const T* g = static_cast<const T*>(gradient.const_data_ptr());
  const T* p = static_cast<const T*>(product.const_data_ptr());
  std::vector<double> forms(gradient.size(0));
  for (double& form : forms) {
    form = dot(g, p, size);
    g += size;
    p += size;
  }
  return forms;
}

template <class T>
std::vector<double> stencil_form(const Tensor& gradient, const Tensor& covariance) {
  const int64_t samples = gradient.size(0), channels = gradient.size(1);
  const int64_t pixels = gradient.size(2) * gradient.size(3);
  std::vector<double> parts(samples * channels), forms(samples);
  Stencil<T>(gradient, covariance)
      .for_each_channel([&](int64_t sample, int64_t channel, const T* g, const T* product) {
        parts[sample * channels + channel] = dot(g, product, pixels);
      });
  for (int64_t part = 0; part < samples * channels; ++part) forms[part / channels] += parts[part];
  return forms;
}

Tensor covariance_form_cpu(const Tensor& gradient, const Tensor& covariance) {
  check_covariance("covariance_form", gradient, covariance);
  const ScalarType dtype = per_sample_dtype(gradient);
  const Tensor g = contiguous_as(gradient, dtype), given = contiguous_as(covariance, dtype);
  std::vector<double> forms;
  dispatch_sums(g, [&](auto zero) {
    using T = decltype(zero);
    if (stencil_pays(g, given, true)) {
      forms = stencil_form<T>(g, given);
      return;
    }
    const Tensor k = contiguous_as(at_all_displacements(given, g), dtype);
    if (sample_elements(g) <= kDenseForm) {
      forms = dense_form<T>(g, k);
      return;
    }
    const Grid<T> grid(g.size(1), g.size(2), g.size(3));
    const auto spectrum = covariance_spectrum(grid, static_cast<const T*>(k.const_data_ptr()));
    forms =
        spectral_form(grid, static_cast<const T*>(g.const_data_ptr()), g.size(0), spectrum.get());
  });
  return to_per_sample_tensor(forms, gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("covariance_form", TORCH_BOX(&covariance_form_cpu));
}

}  // namespace robustkern
