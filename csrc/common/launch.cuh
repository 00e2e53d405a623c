// Kernel launches on a tensor's device, on torch's current stream there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace robustkern {

using torch::stable::Tensor;

constexpr int kBlockThreads = 256;

class Launcher {
 public:
  // Until it is destroyed, the tensor's device is the current one.
  explicit Launcher(const Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Whether that many clusters of blocks would keep the device busy. Clusters came with compute
  // capability 9.0.
  bool is_filled_by_clusters(int64_t clusters, int blocks) const {
    return attribute(cudaDevAttrComputeCapabilityMajor) >= 9 &&
           clusters * blocks >= attribute(cudaDevAttrMultiProcessorCount);
  }

  // Enough blocks to give each of `threads` a thread.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t threads,
                  const Arguments&... arguments) const {
    const int64_t blocks = (threads + kBlockThreads - 1) / kBlockThreads;
    in_clusters(kernel, blocks, kBlockThreads, 1, arguments...);
  }

  // Blocks in clusters of so many, which share what one block's threads do.
  template <class... Parameters, class... Arguments>
  void in_clusters(void (*kernel)(Parameters...), int64_t blocks, int threads_per_block,
                   int blocks_per_cluster, const Arguments&... arguments) const {
    if (blocks == 0) return;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(blocks_per_cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads_per_block));
    config.stream = stream_;
    config.attrs = &cluster;
    config.numAttrs = blocks_per_cluster > 1 ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    if (error != cudaSuccess) (void)cudaGetLastError();  // or a later launch would report it
    STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice,
                    "the CUDA kernels of robustkern need compute capability 8.0 or newer");
    STD_CUDA_CHECK(error);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }

  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// The number of this thread in its grid.
__device__ inline int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

}  // namespace robustkern
