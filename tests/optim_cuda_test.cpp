// Optimizers on a CUDA device against the CPU, which is their oracle. Runs on a real device and on the emulated one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/autograd.h"
#include "core/random.h"
#include "optim/adam.h"
#include "tests/error_of.h"

namespace weft::optim {
namespace {

class CudaOptimizer : public ::testing::Test {
 protected:
  void SetUp() override {
    if (*why_no_cuda() != '\0') GTEST_SKIP() << why_no_cuda();
  }
};

using Values = std::vector<double>;

Tensor to_device(const Tensor& x) {
  const autograd::NoGrad no_grad;
  return x.detach().to(Device::cuda());
}

std::string bytes_of(const Tensor& x) {
  const autograd::NoGrad no_grad;
  const Tensor host = x.detach().contiguous().to(Device::cpu());
  return {static_cast<const char*>(host.raw()), static_cast<size_t>(host.numel() * size_of(host.dtype()))};
}

Tensor random(int64_t n, DType dtype, const std::string& name, double size) {
  const Tensor values = Tensor::empty({n}, DType::f64);
  fill_normal(values, RandomStream(3, name), 0, size);
  return values.to(dtype);
}

/// The same parameters on both devices.
struct Twins {
  Parameters cpu, cuda;

  void add(const std::string& name, int64_t n, DType dtype, ParameterRole role) {
    const Tensor values = random(n, dtype, name, 0.2);
    cpu.push_back({name, values.clone().requires_grad_(), role});
    cuda.push_back({name, to_device(values).requires_grad_(), role});
  }
  void set_gradients(int step, double size) const {
    for (size_t i = 0; i < cpu.size(); ++i) {
      const Tensor& tensor = cpu[i].tensor;
      const Tensor gradient = random(tensor.numel(), tensor.dtype(), concat(cpu[i].name, " step ", step), size);
      tensor.set_grad(gradient);
      cuda[i].tensor.set_grad(to_device(gradient));
    }
  }
};

/// Sizes around those of packs, chunks and pieces.
const std::vector<int64_t> kSizes = {1, 0, 3, 4, 5, 1021, 4095, 4096, 4097, 8192, 16384, 16387, 40009};

/// Every size and role in these dtypes, and so many small tensors that they do not fit into one launch.
Twins make_twins(const std::vector<DType>& dtypes) {
  constexpr ParameterRole kRoles[] = {ParameterRole::weight, ParameterRole::embedding, ParameterRole::bias,
                                      ParameterRole::norm};
  Twins twins;
  for (const DType dtype : dtypes) {
    for (size_t i = 0; i < kSizes.size(); ++i)
      twins.add(concat(dtype, ' ', kSizes[i]), kSizes[i], dtype, kRoles[i % 4]);
    for (int i = 0; i < 64; ++i) twins.add(concat(dtype, " small ", i), 1 + i % 7, dtype, kRoles[i % 8 == 7 ? 2 : 0]);
  }
  return twins;
}

/// The names of all parameters and states whose bits differ.
std::string differences(const Optimizer& a, const Optimizer& b) {
  std::string names;
  const auto compare = [&](const std::string& name, const Tensor& x, const Tensor& y) {
    if (bytes_of(x) != bytes_of(y)) names += name + "; ";
  };
  for (size_t i = 0; i < a.parameters().size(); ++i)
    compare(a.parameters()[i].name, a.parameters()[i].tensor, b.parameters()[i].tensor);
  const NamedTensors x = a.state(), y = b.state();
  EXPECT_EQ(x.size(), y.size());
  for (size_t i = 0; i < x.size(); ++i) compare(x[i].first, x[i].second, y[i].second);
  return names;
}

/// Largest |got - want| / max(1, |want|) over all states and all parameters that are their own master, of f64 or not.
double largest_distance(const Optimizer& got, const Optimizer& want, bool wide) {
  double largest = 0;
  const auto compare = [&](const Tensor& x, const Tensor& y) {
    if ((y.dtype() == DType::f64) != wide) return;
    const Values a = x.to_vector<double>(), b = y.to_vector<double>();
    for (size_t i = 0; i < b.size(); ++i) {
      const double distance = std::abs(a[i] - b[i]) / std::max(1.0, std::abs(b[i]));
      if (!(distance <= largest)) largest = distance;  // NaN too
    }
  };
  for (size_t i = 0; i < want.parameters().size(); ++i) {
    const Tensor& tensor = want.parameters()[i].tensor;
    if (tensor.dtype() == DType::f32 || tensor.dtype() == DType::f64) compare(got.parameters()[i].tensor, tensor);
  }
  const NamedTensors x = got.state(), y = want.state();
  for (size_t i = 0; i < y.size(); ++i) compare(x[i].second, y[i].second);
  return largest;
}

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
const std::vector<DType> kAll(std::begin(kDTypes), std::end(kDTypes));

// ---- Adam ----

// Per element the device takes the CPU's operations in the CPU's order, each rounded the same. (A CPU that cannot fuse
// multiply and add rounds once more: none of those that are found beside such a device.)
TEST_F(CudaOptimizer, AdamTakesStepsOfTheSameBitsAsTheCpu) {
  for (const double beta2 : {0.999, 0.3}) {
    const Twins twins = make_twins(kAll);
    const AdamOptions options{.beta1 = 0.9, .beta2 = beta2, .weight_decay = 0.1};
    Adam cpu(twins.cpu, options), cuda(twins.cuda, options);
    for (int step = 0; step < 4; ++step) {
      twins.set_gradients(step, 0.1);
      if (step == 2) twins.cpu[5].tensor.clear_grad(), twins.cuda[5].tensor.clear_grad();
      cpu.step(0.01);
      cuda.step(0.01);
      ASSERT_EQ(differences(cuda, cpu), "") << "after step " << step << " with beta2 " << beta2;
    }
    EXPECT_NE(bytes_of(cuda.state()[0].second), bytes_of(Tensor::zeros({1}))) << "something happened";
  }
}

TEST_F(CudaOptimizer, AdamOfViewsThatAreNotAlignedWritesThemAloneAndTheSameBits) {
  for (const DType dtype : kDTypes) {
    for (const int64_t n : {7, 4096, 9001}) {
      const autograd::NoGrad no_grad;
      const Tensor values = random(n + 2, dtype, "w", 0.2), gradient = random(n + 1, dtype, "g", 0.1);
      const Tensor there = to_device(values), gradient_there = to_device(gradient);
      const auto inner = [&](const Tensor& x) { return x.slice(0, 1, n + 1); };
      Tensor w = inner(values.clone()), v = inner(there);
      w.requires_grad_().set_grad(inner(gradient));
      v.requires_grad_().set_grad(inner(gradient_there));
      Adam cpu({{"w", w}}, {.weight_decay = 0.1}), cuda({{"w", v}}, {.weight_decay = 0.1});
      for (int step = 0; step < 2; ++step) cpu.step(0.01), cuda.step(0.01);
      EXPECT_EQ(differences(cuda, cpu), "") << dtype << ' ' << n;
      const Values before = values.to_vector<double>(), after = there.to_vector<double>();
      EXPECT_EQ(after.front(), before.front()) << dtype << ' ' << n;
      EXPECT_EQ(after.back(), before.back()) << dtype << ' ' << n;
    }
  }
}

TEST_F(CudaOptimizer, AdamFollowsAParameterThatSomeoneElseChanges) {
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    Twins twins;
    twins.add("w", 5000, dtype, ParameterRole::weight);
    Adam cpu(twins.cpu, {}), cuda(twins.cuda, {});
    for (int step = 0; step < 3; ++step) {
      twins.set_gradients(step, 0.1);
      if (step == 1) {
        for (const Parameters* each : {&twins.cpu, &twins.cuda})
          each->front().tensor.detach().slice(0, 10, 4200, 3).fill_(0.7);
      }
      cpu.step(0.01);
      cuda.step(0.01);
    }
    EXPECT_EQ(differences(cuda, cpu), "") << dtype << ": elements that nobody else changed keep what rounding took";
  }
}

TEST_F(CudaOptimizer, AStateOfTheDeviceContinuesOnTheCpu) {
  const Twins twins = make_twins({DType::bf16, DType::f32});
  Adam cpu(twins.cpu, {}), cuda(twins.cuda, {});
  for (int step = 0; step < 2; ++step) twins.set_gradients(step, 0.1), cuda.step(0.01);
  const autograd::NoGrad no_grad;
  for (size_t i = 0; i < twins.cpu.size(); ++i) twins.cpu[i].tensor.detach().copy_(twins.cuda[i].tensor.detach());
  cpu.load_state(cuda.state());
  twins.set_gradients(2, 0.1);
  cpu.step(0.01);
  cuda.step(0.01);
  EXPECT_EQ(differences(cuda, cpu), "");
  cuda.load_state(cpu.state());
  EXPECT_EQ(differences(cuda, cpu), "");
}

/// Counts each tensor as one of two halves, and weights as if they were larger than they are.
class Halves final : public NormReducer {
 public:
  void reduce(std::span<double> squares, const Parameters& parameters) override {
    EXPECT_EQ(squares.size(), parameters.size());
    for (double& square : squares) square *= ++calls % 3 == 2 ? 8 : 2;
  }
  int calls = 0;
};

// The sums of squares run in another order than on the CPU and are added in f32 over other runs: they differ by some
// 1e-7, and the clip factor and the ratio as much. Four steps of lr r u = 0.01 x 2 x 3 at most carry that over; and in
// f32 a state that differs a little may be rounded the other way, by 6e-8 in each.
TEST_F(CudaOptimizer, ClippingAndTheTrustRatioAreTheCpusUpToTheOrderOfTheirSums) {
  for (const bool trust_ratio : {false, true}) {
    const AdamOptions options{.beta2 = 0.99, .weight_decay = 0.1, .clip_norm = 20, .trust_ratio = trust_ratio};
    const Twins twins = make_twins(kAll), again = make_twins(kAll);
    Adam cpu(twins.cpu, options, std::make_shared<Halves>()), cuda(twins.cuda, options, std::make_shared<Halves>());
    Adam twice(again.cuda, options, std::make_shared<Halves>());
    int clipped = 0;
    for (int step = 0; step < 4; ++step) {
      const double size = step % 2 == 0 ? 0.1 : 0.01;
      twins.set_gradients(step, size);
      again.set_gradients(step, size);
      const StepReport want = cpu.step(0.01), got = cuda.step(0.01);
      twice.step(0.01);
      EXPECT_NEAR(got.grad_norm, want.grad_norm, 1e-6 * want.grad_norm);
      EXPECT_NEAR(got.clip_factor, want.clip_factor, 1e-6);
      clipped += got.clip_factor < 1;
    }
    EXPECT_EQ(clipped, 2);
    EXPECT_LE(largest_distance(cuda, cpu, false), 4 * (0.06 * 1e-7 + 6e-8)) << trust_ratio;
    EXPECT_LE(largest_distance(cuda, cpu, true), 4 * 0.06 * 1e-7)
        << "an f64 tensor shares the clip factor: " << trust_ratio;
    EXPECT_EQ(differences(cuda, twice), "") << "two runs gave different bits";
    for (const Parameter& parameter : twins.cuda) {
      if (parameter.tensor.dtype() != DType::bf16 && parameter.tensor.dtype() != DType::f16) continue;
      for (const auto& [name, tensor] : cuda.state()) {
        if (name == parameter.name + ".master") {
          EXPECT_EQ(bytes_of(parameter.tensor), bytes_of(tensor.to(parameter.tensor.dtype()))) << name << ", rounded";
        }
      }
    }
  }
}

TEST_F(CudaOptimizer, TheRatioIsOneForZeroWeightsAndZeroUpdates) {
  Tensor zero = Tensor::zeros({4, 4}, DType::f32, Device::cuda()),
         still = Tensor::ones({4, 4}, DType::f32, Device::cuda());
  zero.requires_grad_().set_grad(Tensor::ones({4, 4}, DType::f32, Device::cuda()));
  still.requires_grad_().set_grad(Tensor::zeros({4, 4}, DType::f32, Device::cuda()));
  lamb({{"zero", zero}, {"still", still}}, {})->step(0.01);
  for (const double w : zero.to_vector<double>()) EXPECT_NEAR(w, -0.01, 1e-8);
  EXPECT_EQ(still.to_vector<double>(), Values(16, 1));
}

TEST_F(CudaOptimizer, SteadyStepsTakeNothingFromTheSystem) {
  const Twins twins = make_twins({DType::bf16});
  Adam adam(twins.cuda, {.clip_norm = 1, .trust_ratio = true});
  twins.set_gradients(0, 0.1);
  adam.step(1e-3);
  const int64_t asked = allocator(Device::cuda()).statistics().system_allocations;
  for (int step = 0; step < 3; ++step) adam.step(1e-3);
  EXPECT_EQ(allocator(Device::cuda()).statistics().system_allocations, asked);
}

TEST_F(CudaOptimizer, ADryStepCountsTheMemoryOfARealOne) {
  const auto run = [] {
    const int64_t before = allocator(Device::cuda()).statistics().total.current;
    allocator(Device::cuda()).reset_peak();
    Tensor w = Tensor::zeros({70, 100}, DType::bf16, Device::cuda()),
           b = Tensor::zeros({100}, DType::f32, Device::cuda());
    w.requires_grad_().set_grad(Tensor::zeros_like(w));
    b.requires_grad_().set_grad(Tensor::zeros_like(b));
    Adam adam({{"w", w}, {"b", b, ParameterRole::bias}}, {.clip_norm = 1, .trust_ratio = true});
    adam.step(1e-3);
    return allocator(Device::cuda()).statistics().total.peak - before;
  };
  const int64_t real = run();
  const DryRun scope;
  EXPECT_EQ(run(), real);
}

TEST_F(CudaOptimizer, AGradientThatIsNotFiniteStopsTheStepAndIsNamed) {
  for (const double bad : {std::numeric_limits<double>::infinity(), std::nan("")}) {
    for (const DType dtype : kDTypes) {
      Twins twins;
      twins.add("fine", 5000, dtype, ParameterRole::weight);
      twins.add("h.1.weight", 9001, dtype, ParameterRole::weight);
      twins.add("later", 3, dtype, ParameterRole::bias);
      Adam adam(twins.cuda, {.clip_norm = 1}), untouched(twins.cuda, {.clip_norm = 1});
      twins.set_gradients(0, 0.1);
      twins.cuda[1].tensor.grad().slice(0, 8765, 8766).fill_(bad);
      twins.cuda[2].tensor.grad().slice(0, 1, 2).fill_(bad);
      EXPECT_ERROR(ErrorKind::kValue,
                   concat("[grad_norm] the gradient of \"h.1.weight\" (", dtype, " [9001]) is ", bad,
                          " at element 8,765; the step was not taken"),
                   adam.step(0.1));
      EXPECT_EQ(differences(adam, untouched), "");
      for (size_t i = 0; i < twins.cpu.size(); ++i)
        EXPECT_EQ(bytes_of(twins.cuda[i].tensor), bytes_of(twins.cpu[i].tensor));
      EXPECT_EQ(adam.steps(), 0);
    }
  }
}

TEST_F(CudaOptimizer, ParametersOnTwoDevicesAreAnError) {
  Tensor a = Tensor::ones({2}), b = Tensor::ones({2}, DType::f32, Device::cuda());
  a.requires_grad_(), b.requires_grad_();
  EXPECT_ERROR(ErrorKind::kDevice, "[adam] all parameters must be on one device: \"a\" is on cpu, \"b\" on cuda:0",
               Adam({{"a", a}, {"b", b}}, {}));
  EXPECT_ERROR(ErrorKind::kDevice, "[grad_norm] all parameters must be on one device", grad_norm({{"a", a}, {"b", b}}));
}

// ---- norms ----

double plain_norm(const Parameters& parameters) {
  long double total = 0;
  for (const Parameter& parameter : parameters) {
    if (!parameter.tensor.grad().defined()) continue;
    for (const double g : parameter.tensor.grad().to_vector<double>())
      total += static_cast<long double>(g) * static_cast<long double>(g);
  }
  return static_cast<double>(std::sqrt(total));
}

TEST_F(CudaOptimizer, GradNormAgreesWithLongDoubleInEveryDTypeAndLength) {
  EXPECT_EQ(grad_norm({}), 0);
  for (const DType dtype : kDTypes) {
    for (const int64_t n : {1, 3, 1021, 4096, 4097, 8192, 8193, 16384, 16385, 100003}) {
      Twins twins;
      twins.add("x", n, dtype, ParameterRole::weight);
      twins.add("none", 5, dtype, ParameterRole::weight);
      twins.add("empty", 0, dtype, ParameterRole::weight);
      twins.set_gradients(0, 1);
      twins.cuda[1].tensor.clear_grad();
      const double want = plain_norm(twins.cuda);
      // At most 8 squares are added in f32.
      EXPECT_NEAR(grad_norm(twins.cuda), want, want * (dtype == DType::f64 ? 1e-14 : 5e-7)) << dtype << ' ' << n;
    }
  }
}

TEST_F(CudaOptimizer, GradNormHasTheSameBitsForAViewThatIsNotAlignedAndAmongOtherTensors) {
  for (const DType dtype : kDTypes) {
    const int64_t n = 70001;
    const Tensor values = to_device(random(n, dtype, "g", 1)), buffer = Tensor::zeros({n + 1}, dtype, Device::cuda());
    buffer.slice(0, 1, n + 1).copy_(values);
    Tensor a = Tensor::zeros_like(values), b = Tensor::zeros_like(values);
    a.requires_grad_().set_grad(values);
    b.requires_grad_().set_grad(buffer.slice(0, 1, n + 1));
    const double norm = grad_norm({{"a", a}});
    EXPECT_EQ(grad_norm({{"b", b}}), norm) << dtype;
    Twins others;
    for (int i = 0; i < 300; ++i) others.add(concat("zero ", i), 3, dtype, ParameterRole::weight);
    others.set_gradients(0, 0);
    others.cuda.push_back({"a", a});
    EXPECT_EQ(grad_norm(others.cuda), norm) << dtype;
  }
}

TEST_F(CudaOptimizer, GradNormOfValuesWhoseSquaresOverflowOrUnderflowF32) {
  for (const double value : {1e20, 3e38, 1e-23, 1e-38, 1e-44}) {
    Tensor w = Tensor::zeros({2500}, DType::f32, Device::cuda());
    w.requires_grad_().set_grad(to_device(Tensor::full({2500}, value)));
    const double exact = static_cast<double>(static_cast<float>(value));
    EXPECT_NEAR(grad_norm({{"w", w}}), 50 * exact, 50 * exact * 1e-12) << value;
  }
  Tensor x = Tensor::zeros({1}, DType::f64, Device::cuda());
  x.requires_grad_().set_grad(Tensor::full({1}, 1e200, DType::f64, Device::cuda()));
  EXPECT_ERROR(ErrorKind::kValue,
               "[grad_norm] the squares of the gradient of \"x\" (f64 [1]) do not add up to a finite number",
               grad_norm({{"x", x}}));
}

TEST_F(CudaOptimizer, GradNormReadsGradientsInAnyLayout) {
  Tensor w = Tensor::zeros({30, 40}, DType::f32, Device::cuda());
  w.requires_grad_().set_grad(to_device(random(1200, DType::f32, "g", 1).reshape({40, 30})).transpose(0, 1));
  EXPECT_NEAR(grad_norm({{"w", w}}), plain_norm({{"w", w}}), 1e-5);
}

TEST_F(CudaOptimizer, ClipGradNormScalesEachElementByTheFactorRoundedOnce) {
  Twins twins = make_twins(kAll);
  twins.set_gradients(0, 1);
  // Views that are not aligned, within buffers that must stay as they are around them.
  std::vector<Tensor> buffers;
  for (const DType dtype : kDTypes) {
    buffers.push_back(to_device(random(5003, dtype, "buffer", 1)));
    Tensor w = Tensor::zeros({5001}, dtype, Device::cuda());
    w.requires_grad_().set_grad(buffers.back().slice(0, 1, 5002));
    twins.cuda.push_back({concat("view ", dtype), w});
  }
  std::vector<Tensor> before;
  for (const Parameter& parameter : twins.cuda) before.push_back(parameter.tensor.grad().clone().to(Device::cpu()));
  const double norm = clip_grad_norm(twins.cuda, 2.5), factor = 2.5 / norm;
  EXPECT_LT(factor, 0.1);
  for (size_t i = 0; i < before.size(); ++i) {
    dispatch_float(before[i].dtype(), "test", [&]<class T>() {
      T* x = before[i].data<T>();
      for (int64_t k = 0; k < before[i].numel(); ++k)
        x[k] = T(static_cast<Accumulate<T>>(x[k]) * static_cast<Accumulate<T>>(factor));
    });
    EXPECT_EQ(bytes_of(twins.cuda[i].tensor.grad()), bytes_of(before[i])) << twins.cuda[i].name;
  }
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Values whole = buffers[i].to_vector<double>(),
                 was = random(5003, kDTypes[i], "buffer", 1).to_vector<double>();
    EXPECT_EQ(whole.front(), was.front());
    EXPECT_EQ(whole.back(), was.back());
  }
  EXPECT_NEAR(grad_norm(twins.cuda), 2.5, 2.5 * 1e-3) << "f16 and bf16 gradients are rounded again";
}

}  // namespace
}  // namespace weft::optim
