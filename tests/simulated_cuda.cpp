// A CUDA device that is none, for a torch that was built without CUDA: see simulated_cuda.py.
//
// Its tensors have the host's memory and the device cuda:0. Each operator is run by torch's fallback for new devices, which
// copies inputs to the CPU and results back; before that it looks at where the inputs lie. What makes a host wait for a real
// device is counted, and can be made a warning or an error, as by torch.cuda.set_sync_debug_mode.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>

namespace {

using at::Tensor;
const c10::Device DEVICE(c10::DeviceType::CUDA, 0);

// One device and one stream, on which everything is done at once.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
const c10::impl::DeviceGuardImplRegistrar registered_guard(c10::DeviceType::CUDA, new Guard());

// Memory of the device, and pinned memory of the host.
template <bool pinned>
struct Memory final : c10::Allocator {
  static inline std::mutex lock;
  static inline std::set<const void*> held;

  static void release(void* memory) {
    {
      std::lock_guard<std::mutex> guard(lock);
      held.erase(memory);
    }
    std::free(memory);
  }
  static bool has(const void* memory) {
    std::lock_guard<std::mutex> guard(lock);
    return held.count(memory) > 0;
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes ? bytes : 1)) throw std::bad_alloc();
    std::memset(memory, 0xA5, bytes);  // what was never written is not 0
    {
      std::lock_guard<std::mutex> guard(lock);
      held.insert(memory);
    }
    return {memory, memory, &release, pinned ? c10::Device(c10::kCPU) : DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory<false> device_memory;
Memory<true> pinned_memory;

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void* memory) const override { return Memory<true>::has(memory); }
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
const bool registered_hooks = [] {
  at::CUDAHooksRegistry()->Register(
      "CUDAHooks", [](at::CUDAHooksArgs) -> std::unique_ptr<at::CUDAHooksInterface> { return std::make_unique<Hooks>(); },
      "", c10::REGISTRY_PREFERRED);
  return true;
}();

enum Waiting { ALLOWED = 0, WARNS = 1, FAILS = 2 };
int waiting = ALLOWED;
thread_local bool inside = false;  // what an operator does to run on the CPU is no waiting

struct Inside {
  bool before = inside;
  Inside() { inside = true; }
  ~Inside() { inside = before; }
};

void waits(const std::string& why) {
  if (inside) return;
  TORCH_CHECK(waiting != FAILS, "called a synchronizing CUDA operation: ", why);
  if (waiting == WARNS) TORCH_WARN("called a synchronizing CUDA operation: ", why);
}

// The same memory, as a tensor of the CPU.
Tensor on_host(const Tensor& x) {
  if (!x.is_cuda()) return x;
  const at::AutoDispatchBelowAutograd below;
  const Tensor keeps = x.detach();
  return at::from_blob(
      x.data_ptr(), x.sizes(), x.strides(), [keeps](void*) {}, x.options().device(c10::kCPU).requires_grad(false), c10::kCPU);
}

Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(size, &device_memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &device_memory, keys, c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.is_cuda() != from.is_cuda() && !non_blocking) waits(to.is_cuda() ? "a copy to the device" : "a copy to the host");
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy_(target, from, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  on_host(to).copy_(on_host(from));
  return to;
}

at::Scalar local_scalar_dense(const Tensor& x) {
  waits("a number of the device");
  return on_host(x).item();
}

bool equal(const Tensor& one, const Tensor& other) {
  TORCH_CHECK(one.device() == other.device(), "Expected all tensors to be on the same device, in equal");
  waits("equal");
  return at::equal(on_host(one), on_host(other));
}

// Operators whose output's size is known by the device alone.
const std::set<std::string> SIZED_BY_VALUES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
                                               "aten::unique_consecutive", "aten::bincount", "aten::histc"};
// Operators that take indices of the CPU, too.
const std::set<std::string> INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  const bool indexed = INDEXED.count(name) > 0;
  const auto check = [&](const Tensor& x, bool is_index) {
    if (!x.defined()) return;
    if (is_index && (x.scalar_type() == at::kBool || !x.is_cuda())) waits(name + " by a mask, or an index of the host");
    TORCH_CHECK(
        x.is_cuda() || x.dim() == 0 || is_index,
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu, in ", op.schema());
  };
  for (const c10::IValue& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) check(value.toTensor(), false);
    if (value.isList())
      for (const c10::IValue& part : value.toListRef())
        if (part.isTensor()) check(part.toTensor(), indexed);
  }
  const bool sized_late = name == "aten::repeat_interleave" && torch::jit::last(stack, 1)[0].isNone();
  if (SIZED_BY_VALUES.count(name) || sized_late) waits(name);
  const Inside here;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("equal", &equal);
  // Views, which the fallback cannot give.
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", [](const Tensor& x, at::IntArrayRef size, std::optional<at::MemoryFormat> format) -> const Tensor& {
    return at::native::resize_(x, size, format);
  });
  m.impl("_reshape_alias", [](const Tensor& x, at::IntArrayRef size, at::IntArrayRef stride) {
    return at::native::as_strided_tensorimpl(x, size, stride);
  });
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Storage", [](Tensor& x, at::Storage source) -> Tensor& {
    const auto size = static_cast<int64_t>(source.nbytes() / x.itemsize());
    return at::native::set_storage_cpu_(x, std::move(source), 0, {size}, {});
  });
}

extern "C" {
void simulated_waiting(int mode) { waiting = mode; }
void simulated_inside(int on) { inside = on; }
}
