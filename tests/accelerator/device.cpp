// A simulated accelerator: PyTorch's PrivateUse1 backend with two devices, for tests on machines without a GPU.
//
// Memory. All memory lies in one reserved range of addresses. A block has two addresses: the one that tensors hold,
// which nothing can read or write, and one at a fixed distance (`to_host`), which kernels use. Python code, NumPy or a
// C++ extension that reads a tensor of the device as if it were host memory crashes, as it would on a GPU. The same is
// true of a block that was freed, because addresses are never reused.
//
// Kernels. `run_on_cpu` is the kernel of every operator: it hands the CPU kernel the same sizes, strides and values,
// so a result has the CPU's bits. Like CUDA it refuses tensors of two devices, except CPU scalars and index tensors.
//
// Random numbers. Each device has its own generator, whose numbers differ from the CPU's for the same seed.
//
// Counters (kernels, copies with their bytes, waits of the host for values) and switches (no fp64, a memory limit) are
// operators of the library `simulated`, which device.py calls. Not simulated: asynchronous execution, streams, pinned
// memory, timing.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

namespace simulated {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;
using Sizes = at::IntArrayRef;

constexpr auto kSimulated = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;

// Counters and switches. One lock for all of them and for the table of blocks.
std::recursive_mutex lock;
using Locked = std::lock_guard<std::recursive_mutex>;
std::map<std::string, int64_t> counters;
bool without_fp64 = false;
int64_t memory_limit = -1;  // bytes per device; -1: none
int64_t refused = 0;        // bytes in use that the last refused allocation would have led to

void count(const std::string& what, int64_t amount = 1) {
  Locked locked(lock);
  counters[what] += amount;
}

int& current_device() {
  static thread_local int device = 0;
  return device;
}

int index_of(c10::Device device) { return device.has_index() ? device.index() : current_device(); }

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kSimulated; }

// ---- memory

constexpr size_t kSpan = size_t(1) << 40;  // addresses, not memory

struct Block {
  size_t size, mapped;
  int device;
};
std::map<void*, Block> blocks;
int64_t in_use[kDevices], peak[kDevices];

// The address under which kernels use an address of the device.
void* to_host(const void* address) {
  return address == nullptr ? nullptr : const_cast<char*>(static_cast<const char*>(address)) + kSpan;
}

void free_block(void* address) {
  if (address == nullptr) return;
  Locked locked(lock);
  auto found = blocks.find(address);
  in_use[found->second.device] -= found->second.size;
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  mmap(to_host(address), found->second.mapped, PROT_NONE, flags, -1, 0);
  blocks.erase(found);
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    const int device = current_device();
    void* address = size ? allocate_block(size, device) : nullptr;
    return {address, address, &free_block, c10::Device(kSimulated, device)};
  }

  void* allocate_block(size_t size, int device) {
    Locked locked(lock);
    const int64_t needed = in_use[device] + int64_t(size);
    if (memory_limit >= 0 && needed > memory_limit) {
      refused = needed;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "simulated: out of memory: ", size, " bytes do not fit on device ",
                       device, ", which has ", in_use[device], " of ", memory_limit, " bytes in use");
    }
    static char* next = static_cast<char*>(
        mmap(nullptr, 2 * kSpan, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    TORCH_CHECK(next != MAP_FAILED, "simulated: no range of addresses");
    static char* const end = next + kSpan;
    static const size_t page = sysconf(_SC_PAGESIZE);
    const size_t mapped = (size + page - 1) / page * page;
    TORCH_CHECK(next + mapped <= end, "simulated: the range of addresses is used up");
    TORCH_CHECK(mprotect(to_host(next), mapped, PROT_READ | PROT_WRITE) == 0, "simulated: mprotect failed");
    void* address = next;
    next += mapped;
    blocks[address] = Block{size, mapped, device};
    in_use[device] = needed;
    peak[device] = std::max(peak[device], needed);
    return address;
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to_host(to), to_host(from), size);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* each : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      (*each)[0].current = in_use[device];
      (*each)[0].peak = peak[device];
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override { peak[device] = in_use[device]; }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    const size_t total = memory_limit >= 0 ? size_t(memory_limit) : size_t(8) << 30;
    return {total - in_use[device], total};
  }
};
Allocator allocator;

// ---- generators

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index) {
    device_ = c10::Device(kSimulated, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
    set_current_seed(c10::default_rng_seed_val);
  }
  void set_current_seed(uint64_t seed) override {
    given_ = seed;
    at::CPUGeneratorImpl::set_current_seed(seed ^ 0x9E3779B97F4A7C15ULL);  // other numbers than the CPU's
  }
  uint64_t current_seed() const override { return given_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return given_;
  }

 private:
  uint64_t given_ = 0;
};

at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<Generator>(index < 0 ? current_device() : index);
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static std::vector<at::Generator> all{new_generator(0), new_generator(1)};
  return all.at(index < 0 ? current_device() : index);
}

// Lets the CPU kernels that run in its lifetime draw from a generator of the device.
struct Drawing {
  at::Generator source, host = at::detail::getDefaultCPUGenerator();
  Tensor before = host.get_state();
  explicit Drawing(at::Generator source) : source(std::move(source)) { host.set_state(this->source.get_state()); }
  ~Drawing() {
    source.set_state(host.get_state());
    host.set_state(before);
  }
};

// ---- devices

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSimulated; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return {kSimulated, c10::DeviceIndex(current_device())}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(index_of(device) >= 0 && index_of(device) < kDevices, "simulated: invalid device ordinal ", device);
    current_device() = index_of(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device() = index_of(device); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  // There is one stream per device, on which all is done when a call returns: events have nothing to record.
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, {kSimulated, c10::DeviceIndex(index_of(device))});
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
static c10::impl::DeviceGuardImplRegistrar guard_registrar(kSimulated, new Guard());

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device(); }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device() = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(current_device(), device);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? current_device() : exchangeDevice(device);
  }
  at::Device getDeviceFromPtr(void* address) const override {
    Locked locked(lock);
    auto found = blocks.upper_bound(address);
    TORCH_CHECK(found != blocks.begin(), "simulated: not an address of the device");
    return {kSimulated, c10::DeviceIndex((--found)->second.device)};
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override { return new_generator(index); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    c10::DeviceGuard guard(storage.device());
    c10::DataPtr grown = allocator.allocate(size);
    const size_t kept = std::min(size, storage.nbytes());
    if (kept) allocator.copy_data(grown.get(), storage.data_ptr().get(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(grown));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// ---- kernels

// A CPU tensor on the memory of a tensor of the device.
Tensor host_view(const Tensor& tensor) {
  const auto options = at::TensorOptions().dtype(tensor.scalar_type()).device(at::kCPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  void* address = to_host(tensor.const_data_ptr());
  Tensor made = at::from_blob(address, tensor.sizes(), tensor.strides(), [](void*) {}, options);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

Tensor copy_to_device(const Tensor& host, c10::Device device) {
  Tensor made = at::empty_strided(host.sizes(), host.strides(), host.options().device(device));
  if (host.numel()) host_view(made).copy_(host);
  if (host.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

void give_size(const Tensor& self, Sizes sizes) {
  const size_t bytes = (c10::multiply_integers(sizes) + self.storage_offset()) * self.element_size();
  if (bytes > self.storage().nbytes()) Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  if (self.sizes() != sizes) self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
}

template <typename Function>
IValue map_tensors(const IValue& value, const Function& function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& each : value.toTensorVector()) list.push_back(function(each));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& each : value.toOptionalTensorList())
      list.push_back(each.has_value() ? std::optional<Tensor>(function(*each)) : std::nullopt);
    return list;
  }
  return value;
}

// The device on which an operator runs; an error if its tensors are on several.
c10::Device device_of(const std::string& name, at::ArrayRef<IValue> arguments) {
  std::optional<c10::Device> device, asked;
  std::vector<Tensor> tensors;
  for (const IValue& argument : arguments) {
    if (argument.isDevice()) asked = argument.toDevice();
    map_tensors(argument, [&](const Tensor& tensor) {
      if (tensor.defined()) tensors.push_back(tensor);
      if (on_device(tensor) && !device.has_value()) device = tensor.device();
      return tensor;
    });
  }
  const bool indexes = name.find("aten::index") == 0 || name.find("aten::_index_put") == 0 ||
                       name.find("aten::_unsafe_index") == 0;
  for (const Tensor& tensor : tensors) {
    const bool may_be_on_host = tensor.is_cpu() && (indexes || tensor.dim() == 0);
    TORCH_CHECK(!device.has_value() || tensor.device() == *device || may_be_on_host,
                "Expected all tensors to be on the same device, but found at least two devices, ", *device, " and ",
                tensor.device(), "! (", name, ")");
  }
  if (!device.has_value()) device = asked.value_or(c10::Device(kSimulated));
  return {kSimulated, c10::DeviceIndex(index_of(*device))};
}

// The kernel of every operator that computes: the CPU's, on the same memory.
void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = toString(op.operator_name());
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  const c10::Device device = device_of(name, arguments);
  count("kernels");
  if (op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape)) count("waits");

  std::vector<std::pair<Tensor, Tensor>> views;  // a tensor of the device, its view for the kernel
  bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
  at::Generator source = default_generator(device.index());
  Stack inner;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& argument = schema.arguments()[i];
    const IValue& value = arguments[i];
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (argument.type()->str().find("Generator") != std::string::npos) {
      draws = true;
      if (!value.isNone()) source = value.toGenerator();
      TORCH_CHECK(source.device().type() == kSimulated, "Expected a generator of ", device, ", but found one of ",
                  source.device(), " (", name, ")");
      inner.emplace_back();  // the CPU's default generator, which gets the state of `source`
    } else if (value.isDevice()) {
      inner.emplace_back(c10::Device(at::kCPU));
    } else {
      inner.emplace_back(map_tensors(value, [&](const Tensor& tensor) {
        if (!on_device(tensor)) return tensor;
        for (const auto& [known, view] : views)
          if (known.is_same(tensor)) return view;
        // `out=` of no entries may be resized by the kernel, which a view of other memory cannot be.
        const bool grows = written && tensor.numel() == 0;
        Tensor view = grows ? at::empty(tensor.sizes(), tensor.options().device(at::kCPU)) : host_view(tensor);
        views.emplace_back(tensor, view);
        return view;
      }));
    }
  }
  {
    at::AutoDispatchBelowAutograd below;
    std::optional<Drawing> drawing;
    if (draws) drawing.emplace(source);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &inner);
  }
  for (const auto& [tensor, view] : views) {
    if (tensor.sizes() == view.sizes()) continue;
    TORCH_CHECK(tensor.numel() == 0, "simulated: ", name, " has resized an argument");
    give_size(tensor, view.sizes());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(view.sizes(), view.strides());
    host_view(tensor).copy_(view);
  }
  torch::jit::drop(*stack, arguments.size());
  for (const IValue& result : inner) {
    stack->emplace_back(map_tensors(result, [&](const Tensor& made) {
      for (const auto& [tensor, view] : views) {
        if (view.is_same(made)) return tensor;
        TORCH_CHECK(!made.defined() || made.numel() == 0 || !made.storage().is_alias_of(view.storage()),
                    "simulated: ", name, " returns a view; add it to METADATA");
      }
      return made.defined() ? copy_to_device(made, device) : made;
    }));
  }
}

// Operators that compute nothing: the CPU's kernels, which touch no memory, do for tensors of any device.
void change_metadata(const c10::OperatorHandle& op, Stack* stack) {
  at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

at::ScalarType checked(std::optional<at::ScalarType> dtype) {
  const at::ScalarType type = c10::dtype_or_default(dtype);
  TORCH_CHECK_TYPE(!without_fp64 || (type != at::kDouble && type != at::kComplexDouble),
                   "Cannot convert a simulated Tensor to float64 dtype as the device doesn't support float64.");
  return type;
}

Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(c10::Device(kSimulated)));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), checked(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(c10::Device(kSimulated)));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), checked(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  TORCH_CHECK(!from.is_meta() && !to.is_meta(), "Cannot copy out of meta tensor; no data!");
  const bool leaves = on_device(from), enters = on_device(to);
  std::string kind = !enters ? "to_host" : !leaves ? "to_device" : "across";
  if (from.device() == to.device()) kind = "kernels";
  count(kind);
  count(kind + "_bytes", from.numel() * (enters ? to : from).element_size());
  if (to.numel() == 0) return to;
  const Tensor source = leaves ? host_view(from) : from;
  (enters ? host_view(to) : to).copy_(from.is_conj() != to.is_conj() ? source.conj() : source);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const Tensor& self) {
  count("waits");
  return host_view(self).item();
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  give_size(self, C10_AS_INTARRAYREF_SLOW(sizes));
  if (format.has_value()) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

const std::set<std::string> METADATA{"as_strided", "view", "_reshape_alias", "unfold", "view_as_real",
                                     "view_as_complex", "set_.source_Storage", "set_.source_Tensor",
                                     "set_.source_Storage_storage_offset"};

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("resize_", resize_);
  m.impl("record_stream", [](Tensor&, at::Stream) {});
  for (const std::string& name : METADATA)
    m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&change_metadata>());
  // Torch chooses a backend for convolutions by the device, and has none for this one.
  for (const char* name : {"convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

// Torch composes some operators of others on a device without a kernel of its own. Those for which the CPU has a kernel
// must use it, or results would have other bits.
void register_kernels() {
  auto& dispatcher = c10::Dispatcher::singleton();
  static std::vector<c10::RegistrationHandleRAII> registered;
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (name.name.find("aten::") != 0 || !op.has_value() || !op->hasSchema()) continue;
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) continue;
    if (op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) continue;
    bool makes_views = false, has_tensors = false;
    for (const auto& each : op->schema().returns())
      makes_views |= each.alias_info() != nullptr && !each.alias_info()->isWrite();
    for (const auto& each : op->schema().arguments())
      has_tensors |= each.type()->str().find("Tensor") != std::string::npos;
    if (makes_views || !has_tensors) continue;
    registered.push_back(dispatcher.registerImpl(name, c10::DispatchKey::PrivateUse1,
                                                 c10::KernelFunction::makeFromBoxedFunction<&run_on_cpu>(),
                                                 std::nullopt, nullptr, "simulated"));
  }
}

// ---- autocast: torch's own lists of operators, by what becomes of their arguments

enum class Cast { kLower, kFloat, kFloatOption, kWidest };

template <Cast policy>
void autocast(const c10::OperatorHandle& op, Stack* stack) {
  namespace ac = at::autocast;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastPrivateUse1);
  const auto& schema = op.schema().arguments();
  const auto arguments = torch::jit::last(*stack, schema.size());
  const size_t begin = stack->size() - schema.size();
  at::ScalarType type = at::kFloat;
  if (policy == Cast::kLower || policy == Cast::kWidest)
    type = ac::get_lower_precision_fp_from_device_type(kSimulated);
  if (policy == Cast::kWidest)
    for (const IValue& argument : arguments)
      map_tensors(argument, [&](const Tensor& tensor) {
        if (tensor.defined()) type = ac::prioritize(type, tensor, kSimulated);
        return tensor;
      });
  if (policy == Cast::kFloatOption) {
    // The result is fp32 unless a dtype was given; the kernel casts.
    const bool eligible = arguments[0].isTensor() && ac::is_eligible(arguments[0].toTensor(), kSimulated);
    for (size_t i = 0; eligible && i < schema.size(); ++i)
      if (schema[i].name() == "dtype" && arguments[i].isNone()) (*stack)[begin + i] = int64_t(at::kFloat);
  } else {
    for (size_t i = 0; i < schema.size(); ++i)
      (*stack)[begin + i] = map_tensors(arguments[i], [&](const Tensor& tensor) {
        return tensor.defined() ? ac::cached_cast(type, tensor, kSimulated) : tensor;
      });
  }
  op.callBoxed(stack);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  const auto impl = [&](auto kernel, const std::string& op, const std::string& overload = "") {
    m.impl((overload.empty() ? op : op + "." + overload).c_str(), std::move(kernel));
  };
#define CAST(policy, ...) impl(torch::CppFunction::makeFromBoxedFunction<&autocast<Cast::policy>>(), __VA_ARGS__);
#define NAME1(op) #op
#define NAME2(op, overload) #op, #overload
#define PICK(_1, _2, name, ...) name
#define NAMES(...) PICK(__VA_ARGS__, NAME2, NAME1, )(__VA_ARGS__)
#define LOWER(...) CAST(kLower, NAMES(__VA_ARGS__))
#define FLOAT(...) CAST(kFloat, NAMES(__VA_ARGS__))
#define FLOAT_OPTION(...) CAST(kFloatOption, NAMES(__VA_ARGS__))
#define WIDEST(...) CAST(kWidest, NAMES(__VA_ARGS__))
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FLOAT)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT_OPTION)
  AT_FORALL_PROMOTE(WIDEST)
  CAST(kFloat, "norm", "Scalar")
}

// ---- what device.py calls

// `tensor.data = other` between host and device. Torch allows it for CUDA, and so keeps the Parameter objects in
// Module.to; it refuses it for PrivateUse1.
struct Metadata : c10::TensorImpl {
  static void copy(c10::TensorImpl* from, c10::TensorImpl* to) {
    copy_tensor_metadata(from, to, to->version_counter(), to->allow_tensor_metadata_change());
  }
};

void set_data(const Tensor& self, const Tensor& other) {
  Metadata::copy(other.unsafeGetTensorImpl(), self.unsafeGetTensorImpl());
  if (auto* meta = torch::autograd::impl::get_autograd_meta(self)) meta->grad_accumulator_.reset();
}

void start() {
  static Hooks hooks;
  c10::SetAllocator(kSimulated, &allocator);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  register_kernels();
}

TORCH_LIBRARY(simulated, m) {
  m.def("start", &start);
  m.def("set_data", &set_data);
  m.def("device_count() -> int", []() -> int64_t { return kDevices; });
  m.def("current_device() -> int", []() -> int64_t { return current_device(); });
  m.def("set_device", [](int64_t index) { Guard().setDevice({kSimulated, c10::DeviceIndex(index)}); });
  m.def("default_generator", [](int64_t index) { return default_generator(index); });
  m.def("in_use", [](int64_t index) { return in_use[index]; });
  m.def("peak", [](int64_t index) { return peak[index]; });
  m.def("reset_peak", [](int64_t index) { allocator.resetPeakStats(index); });
  m.def("set_memory_limit", [](int64_t bytes) { memory_limit = bytes; });
  m.def("refused", []() -> int64_t { return refused; });
  m.def("set_without_fp64", [](bool on) { without_fp64 = on; });
  m.def("reset_counters", []() {
    Locked locked(lock);
    counters.clear();
  });
  m.def("counters", []() {
    Locked locked(lock);
    c10::Dict<std::string, int64_t> copy;
    for (const auto& [name, value] : counters) copy.insert(name, value);
    return copy;
  });
}

}  // namespace simulated
