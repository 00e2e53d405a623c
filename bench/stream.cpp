// The memory's limit, after McCalpin's STREAM: the best of many passes over arrays in order.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

namespace {

// Calls body(begin, end) on each thread, for its share of n elements.
template <class Body>
void share(int64_t n, int threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) body(n * t / threads, n * (t + 1) / threads);
}

void copy(int64_t n, int threads, const float* a, const float*, float* c) {
  share(n, threads, [=](int64_t begin, int64_t end) {
    std::memcpy(c + begin, a + begin, (end - begin) * sizeof(float));
  });
}

float dot_product(int64_t n, const float* a, const float* b) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += a[i] * b[i];
  return total;
}

void dot(int64_t n, int threads, const float* a, const float* b, float* c) {
  share(n, threads, [=](int64_t begin, int64_t end) {
    c[begin] = dot_product(end - begin, a + begin, b + begin);
  });
}

void triad(int64_t n, int threads, const float* a, const float* b, float* c) {
  share(n, threads, [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) c[i] = a[i] + 3.0f * b[i];
  });
}

// Bytes per second that arrays of `bytes` bytes each are read and written with.
double bandwidth(const std::string& kind, int64_t bytes, int threads, int repeats) {
  const auto pass = kind == "copy" ? copy : kind == "dot" ? dot : kind == "triad" ? triad : nullptr;
  const int64_t n = bytes / static_cast<int64_t>(sizeof(float));
  if (pass == nullptr || threads < 1 || n < threads || repeats < 1) {
    throw std::invalid_argument("bandwidth: kind must be copy, dot or triad, the rest positive");
  }
  const std::unique_ptr<float[]> a(new float[n]), b(new float[n]), c(new float[n]);
  share(n, threads, [&](int64_t begin, int64_t end) {  // each thread touches its own share first
    std::fill(&a[begin], &a[end], 1.0f);
    std::fill(&b[begin], &b[end], 2.0f);
    std::fill(&c[begin], &c[end], 0.0f);
  });
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pass(n, threads, a.get(), b.get(), c.get());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::min(best, seconds.count());
  }
  const int arrays = kind == "triad" ? 3 : 2;
  return static_cast<double>(arrays * n * static_cast<int64_t>(sizeof(float))) / best;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("bandwidth", &bandwidth, pybind11::arg("kind"), pybind11::arg("bytes"),
        pybind11::arg("threads"), pybind11::arg("repeats"),
        pybind11::call_guard<pybind11::gil_scoped_release>());
}
