// A group of one GPU, whose data travel with NCCL: what each collective answers, and a training step of a model on it.
// Several GPUs of one machine: weft launch, and weft verify.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "core/backend.h"
#include "core/random.h"
#include "dist/processes.h"
#include "dist/threads.h"
#include "models/parallel_gpt.h"

namespace weft::dist {
namespace {

class OneGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (*why_no_cuda() != '\0') GTEST_SKIP() << why_no_cuda();
    if (*why_no_nccl() != '\0') GTEST_SKIP() << why_no_nccl();
    directory_ = ::testing::TempDir() + "weft_nccl_" + std::to_string(::getpid());
    store_.emplace(directory_);
    world_.emplace(nccl_group({.rank = 0, .size = 1}, *store_, 0));
  }
  void TearDown() override {
    world_.reset();
    if (!directory_.empty()) std::filesystem::remove_all(directory_);
  }
  std::string directory_;
  std::optional<FileStore> store_;
  std::optional<Group> world_;
};

TEST_F(OneGpu, EveryCollectiveAnswersWithWhatItWasGiven) {
  Group& world = *world_;
  EXPECT_STREQ(world.implementation(), "nccl");
  EXPECT_EQ(world.device(), Device::cuda());
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    const Tensor host = Tensor::empty({6, 5}, DType::f32);
    fill_uniform(host, RandomStream(3, "values"), -1, 1);
    const Tensor x = host.to(dtype).to(Device::cuda());
    const std::vector<double> want = x.to_vector<double>();
    for (const Reduction reduction : {Reduction::sum, Reduction::max}) {
      const Tensor y = x.clone();
      world.all_reduce_(y, reduction);
      EXPECT_EQ(y.to_vector<double>(), want) << dtype;
    }
    EXPECT_EQ(world.all_reduce(x).to_vector<double>(), want) << dtype;
    EXPECT_EQ(world.reduce_scatter(x).to_vector<double>(), want) << dtype;
    EXPECT_EQ(world.all_gather(x).to_vector<double>(), want) << dtype;
    EXPECT_EQ(world.all_to_all(x).to_vector<double>(), want) << dtype;
    const Tensor y = x.clone();
    world.broadcast_(y, 0);
    EXPECT_EQ(y.to_vector<double>(), want) << dtype;
  }
  world.barrier();
}

TEST_F(OneGpu, AWorkUnderWayMayBeWaitedForLater) {
  const Tensor x = Tensor::full({1 << 20}, 2, DType::f32, Device::cuda());
  Work work = world_->all_reduce_async_(x);
  work.wait();
  EXPECT_EQ(x.to_vector<float>(), std::vector<float>(1 << 20, 2));
}

TEST_F(OneGpu, AStepHasTheGradientsOfAGroupWithoutALibrary) {
  const auto gradients = [](Group& world) {
    models::ParallelGpt gpt(world, {.mesh = Mesh::parse("dp=1", 1)},
                            {.layers = 2, .heads = 2, .width = 32, .context = 8, .vocab = 37}, Device::cuda(), 1);
    std::vector<int32_t> ids(16);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(5 * i % 37);
    const Tensor tokens = Tensor::from(ids, {2, 8}, Device::cuda());
    gpt.begin_step(1);
    const std::vector<models::MicroBatch> batches = {{tokens, tokens}};
    gpt.run(batches, [](size_t) { return models::GptStep{}; });
    gpt.reduce();
    std::vector<std::vector<double>> all;
    for (const Parameter& parameter : gpt.parameters()) all.push_back(parameter.tensor.grad().to_vector<double>());
    return all;
  };
  Group alone = self_group(Device::cuda());
  EXPECT_EQ(gradients(*world_), gradients(alone));
}

}  // namespace
}  // namespace weft::dist
