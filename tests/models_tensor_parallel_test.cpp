// Layers and a GPT cut over ranks are the plain ones: values, gradients, masks, initial parameters, bytes.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "core/autograd.h"
#include "dist/collective_ops.h"
#include "dist/mesh_norms.h"
#include "dist/threads.h"
#include "models/gpt.h"
#include "ops/elementwise.h"
#include "ops/loss.h"
#include "optim/adam.h"
#include "tests/error_of.h"
#include "tests/values.h"

namespace weft::models {
namespace {

using dist::Collective;
using dist::Group;
using testing::leaf;
using testing::random;
using testing::same_bits;

/// Largest |got - want|, in units of the largest |want|; infinite if a NaN is in the way.
double error(const Tensor& got, const Tensor& want) {
  const std::vector<double> a = got.to_vector<double>(), b = want.to_vector<double>();
  EXPECT_TRUE(got.shape() == want.shape()) << got.describe() << ' ' << want.describe();
  double worst = 0, most = 0;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    const double e = std::abs(a[i] - b[i]);
    if (!(e <= worst)) worst = std::isnan(e) ? INFINITY : e;
    most = std::max(most, std::abs(b[i]));
  }
  return worst == 0 ? 0 : worst / most;
}

/// What a rank holds of a whole tensor.
Tensor part_of(const Parameter& parameter, const Tensor& whole) {
  return parameter.part ? parameter.part->of(whole) : whole;
}

/// A sum of `terms` products whose order differs: each addition rounds by half a unit in the last place of a sum that
/// is at most the sum of all magnitudes, which for random terms is less than sqrt(terms) times the result's size.
double bound(DType dtype, int64_t terms) {
  if (dtype == DType::f64) return 1e-12;
  return (dtype == DType::f32 ? 0x1p-24 : 0x1p-8) * static_cast<double>(terms);
}

// ---- layers ----

constexpr int64_t kRows = 7, kWidth = 6, kHidden = 11;

/// y = row(gelu(column(norm(x)))), cut over a group or not at all.
class TwoLayers : public Module {
 public:
  TwoLayers(const Split& split, DType dtype)
      : split_(split),
        norm_(kWidth, 1e-5, init(dtype).at("norm"), split),
        column_(kWidth, kHidden, {split.share(kHidden)}, 0.5, init(dtype).at("column"), split),
        row_(kHidden, kWidth, split.share(kHidden), 0.5, init(dtype).at("row"), split) {
    add("norm", norm_);
    add("column", column_);
    add("row", row_);
    const autograd::NoGrad no_grad;  // biases and norms that are not 0 and 1
    for (Parameter& p : parameters_of()) {
      if (p.role == ParameterRole::weight) continue;
      const Shape whole = p.part ? p.part->whole : p.tensor.shape();
      p.tensor.copy_(part_of(p, random(whole, dtype, p.name.c_str())));
    }
  }
  Tensor operator()(const Tensor& x) const { return row_(gelu(column_(norm_(x), kRows))); }
  Parameters parameters_of() const { return parameters(); }

 private:
  static Init init(DType dtype) { return {3, dtype}; }
  Split split_;
  LayerNorm norm_;
  ColumnLinear column_;
  RowLinear row_;
};

std::map<std::string, Tensor> gradients_of(const Module& module) {
  std::map<std::string, Tensor> gradients;
  for (const Parameter& p : module.parameters()) gradients[p.name] = p.tensor.grad();
  return gradients;
}

/// Gradients of what a rank holds against those of the whole.
void expect_gradients(const Module& module, const std::map<std::string, Tensor>& whole, double tolerance) {
  for (const Parameter& p : module.parameters()) {
    EXPECT_LE(error(p.tensor.grad(), part_of(p, whole.at(p.name))), tolerance) << p.name;
  }
}

TEST(TensorParallelLayers, AreThePlainLayersForEveryNumberOfRanks) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    const Tensor x = random({kRows, kWidth}, dtype, "x"), dy = random({kRows, kWidth}, dtype, "dy");
    const TwoLayers whole({}, dtype);
    const Tensor whole_x = leaf(x), whole_y = whole(whole_x);
    whole_y.backward(dy);
    const auto gradients = gradients_of(whole);
    for (const int ranks : {1, 2, 3, 4}) {
      for (const bool sequence : {false, true}) {
        SCOPED_TRACE(concat(dtype, ", ", ranks, " ranks, sequence ", sequence));
        dist::run_threads(ranks, [&](Group& world) {
          const Split split(&world, sequence);
          const TwoLayers layers(split, dtype);
          const IndexRange rows = split.sequence() ? split.share(kRows) : IndexRange{0, kRows};
          const Tensor here = leaf(x.narrow(0, rows.begin, rows.count()));
          const Tensor y = layers(here);
          y.backward(dy.narrow(0, rows.begin, rows.count()).clone());
          // The longest sum is over the rows of a norm, then over the hidden channels, and five layers follow one
          // another.
          const double tolerance = ranks == 1 ? 0 : bound(dtype, kRows + kWidth + kHidden);
          EXPECT_LE(error(y, whole_y.narrow(0, rows.begin, rows.count())), tolerance);
          EXPECT_LE(error(here.grad(), whole_x.grad().narrow(0, rows.begin, rows.count())), tolerance);
          expect_gradients(layers, gradients, tolerance);
        });
      }
    }
  }
}

TEST(TensorParallelLayers, WordsOfAPartOfATableAddUpToTheWholeBitForBit) {
  constexpr int64_t kWords = 13;
  const Tensor ids = Tensor::from(std::vector<int32_t>{0, 12, 5, 5, 6, 4, 9, 3, 12, 1, 7, 2}, {3, 4});
  const Tensor dy = random({3, 4, kWidth}, DType::f32, "dy");
  const Embedding whole(kWords, kWidth, 1, Init{3});
  const Tensor whole_y = whole(ids);
  whole_y.backward(dy);
  for (const int ranks : {1, 2, 3, 4}) {
    dist::run_threads(ranks, [&](Group& world) {
      const Embedding part(kWords, kWidth, 1, Init{3}, Split(&world, false));
      const Tensor y = part(ids);
      y.backward(dy);
      EXPECT_TRUE(same_bits(y, whole_y));
      const Parameter weight = part.parameters().front();
      EXPECT_TRUE(same_bits(weight.tensor.grad(), part_of(weight, whole.weight().grad())));

      const Split split(&world, true);
      const Embedding cut(kWords, kWidth, 1, Init{3}, split);
      if (ranks == 1) return;
      const IndexRange rows = split.share(12);
      const Tensor some = cut(ids);
      some.backward(dy.reshape({12, kWidth}).narrow(0, rows.begin, rows.count()).clone());
      EXPECT_TRUE(same_bits(some, whole_y.reshape({12, kWidth}).narrow(0, rows.begin, rows.count()).clone()));
      EXPECT_TRUE(same_bits(cut.weight().grad(), part_of(weight, whole.weight().grad())));
    });
  }
}

TEST(TensorParallelLayers, SharesOfRowsMayBeNone) {
  const Tensor ids = Tensor::from(std::vector<int32_t>{0, 4}, {1, 2});
  dist::run_threads(3, [&](Group& world) {
    const Embedding part(5, kWidth, 1, Init{3}, Split(&world, true));
    const Tensor y = part(ids);
    EXPECT_EQ(y.size(0), world.rank() == 2 ? 0 : 1);
    y.backward(Tensor::ones(y.shape()));
    EXPECT_TRUE(part.weight().grad().defined());
  });
}

TEST(TensorParallelLayers, AHeadCutByWordsExchangesTwoNumbersARowOnceAChunk) {
  constexpr int64_t kWords = 13, kChannels = 6, kTokens = 11;
  const Tensor x = random({kTokens, kChannels}, DType::f64, "x"), w = random({kWords, kChannels}, DType::f64, "w");
  const Tensor targets = Tensor::from(std::vector<int32_t>{0, 12, 5, -1, 6, 4, 9, 3, -1, 1, 7}, {kTokens});
  const auto options = [](int64_t chunk_rows) {
    LinearCrossEntropyOptions chosen;
    chosen.ignore_index = -1, chosen.chunk_rows = chunk_rows;
    return chosen;
  };
  const Tensor whole_x = leaf(x), whole_w = leaf(w);
  const Tensor want = linear_cross_entropy(whole_x, whole_w, targets, options(0));
  want.backward();
  for (const int ranks : {2, 3, 4}) {
    for (const int64_t chunk_rows : {1, 4, 11}) {
      dist::run_threads(ranks, [&](Group& world) {
        const IndexRange words = Split(&world, false).share(kWords);
        const Tensor own_x = leaf(x), own_w = leaf(w.narrow(0, words.begin, words.count()));
        LinearCrossEntropyOptions cut = options(chunk_rows);
        cut.slice = {words.begin, kWords, (kWords + ranks - 1) / ranks,
                     [&](const Tensor& parts) { return world.all_gather(parts); }};
        const Tensor loss = linear_cross_entropy(dist::replicate(own_x, world), own_w, targets, cut);
        const auto sent = world.traffic(Collective::all_gather);
        EXPECT_EQ(sent.calls, (kTokens + chunk_rows - 1) / chunk_rows);
        EXPECT_EQ(sent.bytes_sent, (ranks - 1) * kTokens * 2 * 8);
        loss.backward();
        EXPECT_LE(error(loss, want), 1e-14);
        EXPECT_LE(error(own_x.grad(), whole_x.grad()), 1e-14);
        EXPECT_LE(error(own_w.grad(), whole_w.grad().narrow(0, words.begin, words.count())), 1e-14);
      });
    }
  }
  LinearCrossEntropyOptions wrong;
  wrong.slice = {8, 13, 7, [](const Tensor& parts) { return parts; }};
  EXPECT_ERROR(ErrorKind::kValue, "a slice needs", linear_cross_entropy(x, w.narrow(0, 0, 6), targets, wrong));
}

// ---- GPT ----

/// Nothing divides by anything: 5 heads of 3, 23 words, hidden 60, 3 x 7 rows.
GptConfig odd() {
  GptConfig config{.layers = 2, .heads = 5, .width = 15, .context = 8, .vocab = 23};
  config.dropout = 0.2;
  return config;
}
constexpr int64_t kBatch = 3, kPositions = 7;
const GptStep kStep = {.step = 3, .first_row = 2, .valid_tokens = 29.5};

Tensor some_ids(const char* name, int64_t vocab = 23) {
  std::vector<int32_t> ids;
  const RandomStream stream(5, name);
  for (uint64_t i = 0; i < kBatch * kPositions; ++i)
    ids.push_back(static_cast<int32_t>(stream.below(i, static_cast<uint64_t>(vocab))));
  return Tensor::from(ids, {kBatch, kPositions});
}

Tensor some_targets() {
  std::vector<int32_t> targets = some_ids("targets").to_vector<int32_t>();
  for (size_t i = 4; i < targets.size(); i += 5) targets[i] = -1;
  return Tensor::from(targets, {kBatch, kPositions});
}

struct Layout {
  Group* group;
  bool sequence;
  GptPart part() const {
    GptPart part;
    part.tensor = group, part.sequence = sequence;
    return part;
  }
};

/// Runs `program` on several numbers of ranks, with and without sequence parallelism.
void on_layouts(std::initializer_list<int> counts, const std::function<void(const Layout&)>& program) {
  for (const int ranks : counts) {
    for (const bool sequence : {false, true}) {
      SCOPED_TRACE(concat(ranks, " ranks, sequence ", sequence));
      dist::run_threads(ranks, [&](Group& world) { program({&world, sequence}); });
    }
  }
}

/// Sums over ranks are rounded, and once more with the bias: half a unit in the last place for each, in four branches
/// and the head. So against the same weights in f64 a gradient is further off than the plain model's by a few units at
/// most.
TEST(TensorParallelGpt, IsAsExactAsThePlainModelIn16Bits) {
  const Tensor ids = some_ids("ids"), targets = some_targets();
  for (const auto& [dtype, unit] : {std::pair{DType::bf16, 0x1p-8}, std::pair{DType::f16, 0x1p-11}}) {
    SCOPED_TRACE(concat(dtype));
    const Gpt whole(odd(), Device::cpu(), 1, dtype);
    Gpt exact(odd(), Device::cpu(), 1, DType::f64);
    NamedTensors weights;
    for (const auto& [name, tensor] : whole.named_tensors()) weights.emplace_back(name, tensor.detach().to(DType::f64));
    exact.load(weights);
    const Tensor want = exact.loss(ids, targets, kStep), got = whole.loss(ids, targets, kStep);
    want.backward();
    got.backward();
    const auto right = gradients_of(exact), plain = gradients_of(whole);
    on_layouts({2, 3, 4}, [&, dtype = dtype, unit = unit](const Layout& layout) {
      const Gpt gpt(odd(), Device::cpu(), 1, dtype, layout.part());
      const Tensor loss = gpt.loss(ids, targets, kStep);
      loss.backward();
      EXPECT_LE(error(loss, want), 2 * error(got, want) + unit / 16);
      for (const Parameter& p : gpt.parameters()) {
        const double off = error(p.tensor.grad(), part_of(p, right.at(p.name))),
                     plain_off = error(part_of(p, plain.at(p.name)), part_of(p, right.at(p.name)));
        EXPECT_LE(off, 2 * plain_off + 2.5 * unit) << p.name;
      }
    });
  }
}

TEST(TensorParallelGpt, LossAndEveryGradientAreThoseOfOneProcess) {
  const Tensor ids = some_ids("ids"), targets = some_targets();
  for (const DType dtype : {DType::f64, DType::f32}) {
    SCOPED_TRACE(concat(dtype));
    const Gpt whole(odd(), Device::cpu(), 1, dtype);
    const Tensor whole_loss = whole.loss(ids, targets, kStep);
    whole_loss.backward();
    const auto gradients = gradients_of(whole);
    on_layouts({1, 2, 3, 4}, [&](const Layout& layout) {
      const Gpt gpt(odd(), Device::cpu(), 1, dtype, layout.part());
      const Tensor loss = gpt.loss(ids, targets, kStep);
      loss.backward();
      const bool one = layout.group->size() == 1;
      const double tolerance = one ? 0 : bound(dtype, 60);
      EXPECT_LE(error(loss, whole_loss), tolerance);
      expect_gradients(gpt, gradients, tolerance);
    });
  }
}

TEST(TensorParallelGpt, OneRankHasTheBitsOfThePlainModel) {
  const Tensor ids = some_ids("ids"), targets = some_targets();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Gpt whole(odd(), Device::cpu(), 1, dtype);
    const Tensor whole_loss = whole.loss(ids, targets, kStep);
    whole_loss.backward();
    on_layouts({1}, [&](const Layout& layout) {
      const Gpt gpt(odd(), Device::cpu(), 1, dtype, layout.part());
      const Tensor loss = gpt.loss(ids, targets, kStep);
      loss.backward();
      EXPECT_TRUE(same_bits(loss, whole_loss));
      EXPECT_TRUE(same_bits(gpt.logits(ids), whole.logits(ids)));
      const Parameters a = gpt.parameters(), b = whole.parameters();
      ASSERT_EQ(a.size(), b.size());
      for (size_t i = 0; i < a.size(); ++i) {
        EXPECT_FALSE(a[i].part) << a[i].name;
        EXPECT_TRUE(same_bits(a[i].tensor, b[i].tensor)) << a[i].name;
        EXPECT_TRUE(same_bits(a[i].tensor.grad(), b[i].tensor.grad())) << a[i].name;
      }
      for (const auto& traffic : layout.group->traffic()) EXPECT_EQ(traffic.calls, 0);
    });
  }
}

TEST(TensorParallelGpt, PartsTileEveryParameterOnceAndHaveItsInitialValues) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Gpt whole(odd(), Device::cpu(), 1, dtype);
    std::map<std::string, Tensor> tensors;
    for (const auto& [name, tensor] : whole.named_tensors()) tensors[name] = tensor;
    for (const int ranks : {2, 3, 4, 5}) {
      std::map<std::string, std::vector<int>> holders;  // of each element; whole tensors: 0 on rank 0
      std::mutex mutex;
      dist::run_threads(ranks, [&](Group& world) {
        const Gpt gpt(odd(), Device::cpu(), 1, dtype, Layout{&world, false}.part());
        const std::lock_guard lock(mutex);
        EXPECT_EQ(gpt.parameters().size(), tensors.size());
        for (const Parameter& p : gpt.parameters()) {
          const Tensor& tensor = tensors.at(p.name);
          EXPECT_TRUE(same_bits(p.tensor, part_of(p, tensor))) << p.name;
          const bool cut = p.name == "wte.weight" || p.name.find("qkv") != std::string::npos ||
                           p.name.find(".fc.") != std::string::npos || p.name.ends_with("proj.weight");
          EXPECT_EQ(p.part.has_value(), cut) << p.name;
          auto& held = holders[p.name];
          held.resize(static_cast<size_t>(tensor.numel()));
          if (!p.part && world.rank() > 0) continue;
          p.part.value_or(TensorPart::all(tensor.shape())).for_each_run([&](int64_t at, int64_t, int64_t count) {
            for (int64_t i = at; i < at + count; ++i) ++held[static_cast<size_t>(i)];
          });
        }
      });
      for (const auto& [name, held] : holders) EXPECT_EQ(held, std::vector<int>(held.size(), 1)) << name;
    }
  }
}

TEST(TensorParallelGpt, TheQueryKeyAndValueRowsOfARankAreThreeRanges) {
  dist::run_threads(2, [](Group& world) {
    const Gpt gpt(odd(), Device::cpu(), 1, DType::f32, Layout{&world, false}.part());
    for (const Parameter& p : gpt.parameters()) {
      if (p.name != "h.0.attn.qkv.weight") continue;
      const std::vector<IndexRange> want = world.rank() == 0 ? std::vector<IndexRange>{{0, 9}, {15, 24}, {30, 39}}
                                                             : std::vector<IndexRange>{{9, 15}, {24, 30}, {39, 45}};
      EXPECT_EQ(p.part->ranges, want);
      EXPECT_EQ(p.part->dim, 0);
      EXPECT_TRUE(p.part->whole == Shape({45, 15}));
    }
  });
}

TEST(TensorParallelGpt, RecomputationKeepsTheBits) {
  const Tensor ids = some_ids("ids"), targets = some_targets();
  on_layouts({3}, [&](const Layout& layout) {
    const auto run = [&](const Recompute& recompute) {
      GptConfig config = odd();
      config.recompute = recompute;
      const Gpt gpt(config, Device::cpu(), 1, DType::f32, layout.part());
      gpt.loss(ids, targets, kStep).backward();
      return gradients_of(gpt);
    };
    const auto plain = run({});
    for (const Recompute& recompute :
         {Recompute{.block = true}, Recompute{.norm = true, .activation = true, .attention = true},
          Recompute{.block = true, .norm = true, .activation = true, .attention = true}}) {
      for (const auto& [name, gradient] : run(recompute)) EXPECT_TRUE(same_bits(gradient, plain.at(name))) << name;
    }
  });
}

TEST(TensorParallelGpt, TwentyStepsOfAdamWStayWithinTheBound) {
  const Tensor ids = some_ids("ids"), targets = some_targets();
  const auto train = [&](const Gpt& gpt, Group* group) {
    dist::MeshNorms::Groups groups;
    groups.tensor = group;
    optim::Adam adam(gpt.parameters(), {.weight_decay = 0.1, .clip_norm = 1},
                     std::make_shared<dist::MeshNorms>(groups));
    std::vector<double> losses;
    for (uint64_t step = 0; step < 20; ++step) {
      const Tensor loss = gpt.loss(ids, targets, {.step = step});
      losses.push_back(loss.item());
      loss.backward();
      adam.step(1e-2);
      adam.zero_grad();
    }
    return losses;
  };
  // A step moves a weight by lr, of a gradient's error by lr / gradient times it: 20 steps of f32 are allowed 100 times
  // the error of one loss.
  for (const auto& [dtype, tolerance] :
       {std::pair{DType::f64, 1e-10}, std::pair{DType::f32, 100 * bound(DType::f32, 60)}}) {
    const Gpt whole(odd(), Device::cpu(), 1, dtype);
    const std::vector<double> want = train(whole, nullptr);
    EXPECT_LT(want.back(), 0.8 * want.front());
    on_layouts({1, 2, 3, 4}, [&, dtype = dtype, tolerance = tolerance](const Layout& layout) {
      const Gpt gpt(odd(), Device::cpu(), 1, dtype, layout.part());
      const std::vector<double> losses = train(gpt, layout.group);
      for (size_t i = 0; i < want.size(); ++i) {
        if (layout.group->size() == 1) {
          EXPECT_EQ(losses[i], want[i]) << i;
        } else {
          EXPECT_NEAR(losses[i], want[i], tolerance) << i;
        }
      }
    });
  }
}

TEST(TensorParallelGpt, EveryRankHasTheSameLoss) {
  const Tensor ids = some_ids("ids"), targets = some_targets();
  on_layouts({4}, [&](const Layout& layout) {
    const Gpt gpt(odd(), Device::cpu(), 1, DType::f32, layout.part());
    const Tensor loss = gpt.loss(ids, targets, kStep).detach().reshape({1});
    const Tensor all = layout.group->all_gather(loss);
    for (int64_t r = 0; r < 4; ++r) EXPECT_TRUE(same_bits(all.narrow(0, r, 1).clone(), loss));
  });
}

TEST(TensorParallelGpt, StagesOfAPipelineExchangeWhatStreamShapeSays) {
  const Tensor ids = some_ids("ids"), targets = some_targets();
  on_layouts({1, 3}, [&](const Layout& layout) {
    GptPart first = layout.part(), last = layout.part();
    first.layers = {{0, 1}}, last.layers = {{1, 2}};
    const Gpt whole(odd(), Device::cpu(), 1, DType::f32, layout.part()),
        front(odd(), Device::cpu(), 1, DType::f32, first), back(odd(), Device::cpu(), 1, DType::f32, last);
    const GptStream sent = front.blocks(front.begin(ids, kStep), 0, 1, kStep);
    const Shape shape = back.stream_shape(ids.shape());
    EXPECT_TRUE(sent.x.shape() == shape && sent.branch.shape() == shape) << sent.x.describe();
    EXPECT_EQ(sent.x.dtype(), back.dtype());
    const GptStream received = {leaf(sent.x.detach()), leaf(sent.branch.detach()), ids.shape()};
    const Tensor loss = back.finish(back.blocks(received, 1, 2, kStep), targets, kStep);
    loss.backward();
    autograd::backward({sent.x, sent.branch}, {received.x.grad(), received.branch.grad()});
    const Tensor want = whole.loss(ids, targets, kStep);
    want.backward();
    EXPECT_TRUE(same_bits(loss, want));
    auto gradients = gradients_of(whole);
    for (const Gpt* stage : {&front, &back}) {
      for (const Parameter& p : stage->parameters()) {
        if (p.name == "wte.weight") continue;  // its two uses add up on one stage each
        EXPECT_TRUE(same_bits(p.tensor.grad(), gradients.at(p.name))) << p.name;
      }
    }
    if (layout.sequence && layout.group->size() > 1) {
      EXPECT_ERROR(ErrorKind::kShape, "ids must be [B, T]", back.blocks({received.x, received.branch}, 1, 2));
      EXPECT_ERROR(ErrorKind::kShape, "has tensors", back.blocks({received.x, received.branch, {1, 7}}, 1, 2));
    }
  });
}

// ---- bytes ----

/// What rank `rank` of n sends, of `rows` rows of `row` elements of `size` bytes each that are cut as evenly as can be.
struct Bytes {
  int rank, n;
  int64_t size;
  int64_t own(int64_t rows) const { return dist::even_counts(rows, n)[static_cast<size_t>(rank)]; }
  int64_t all_reduce(int64_t elements) const { return (elements + (n - 2) * own(elements)) * size; }
  int64_t all_gather(int64_t rows, int64_t row) const { return (n - 1) * own(rows) * row * size; }
  int64_t reduce_scatter(int64_t rows, int64_t row) const { return (rows - own(rows)) * row * size; }
};

TEST(TensorParallelGpt, SendsWhatTheFormulasSay) {
  const Tensor ids = some_ids("ids"), targets = some_targets();
  const GptConfig config = odd();
  constexpr int64_t kAll = kBatch * kPositions;
  on_layouts({2, 3, 4}, [&](const Layout& layout) {
    Group& group = *layout.group;
    const Gpt gpt(config, Device::cpu(), 1, DType::f32, layout.part());
    gpt.loss(ids, targets, kStep).backward();
    const int64_t l = config.layers, c = config.width;
    const Bytes f32{group.rank(), group.size(), 4};
    const int64_t head = (group.size() - 1) * kAll * 2 * 8;  // one chunk
    const auto reduced = group.traffic(Collective::all_reduce), gathered = group.traffic(Collective::all_gather),
               scattered = group.traffic(Collective::reduce_scatter);
    if (!layout.sequence) {
      EXPECT_EQ(reduced.calls, 4 * l + 2);
      EXPECT_EQ(reduced.bytes_sent, (4 * l + 2) * f32.all_reduce(kAll * c));
      EXPECT_EQ(gathered.calls, 1);
      EXPECT_EQ(gathered.bytes_sent, head);
      EXPECT_EQ(scattered.calls, 0);
    } else {
      EXPECT_EQ(scattered.calls, 4 * l + 2);
      EXPECT_EQ(scattered.bytes_sent, (4 * l + 2) * f32.reduce_scatter(kAll, c));
      EXPECT_EQ(gathered.calls, (4 * l + 2) + (2 * l + 1) + 1);
      EXPECT_EQ(gathered.bytes_sent, (6 * l + 3) * f32.all_gather(kAll, c) + head);
      EXPECT_EQ(reduced.calls, 6 * l + 3);
      EXPECT_EQ(reduced.bytes_sent, (6 * l + 2) * f32.all_reduce(c) + f32.all_reduce(kPositions * c));
    }
  });
}

TEST(TensorParallelGpt, RecomputedBlocksRunTheirForwardSumsAgain) {
  const Tensor ids = some_ids("ids"), targets = some_targets();
  GptConfig config = odd();
  config.recompute.block = true;
  const int64_t l = config.layers;
  on_layouts({2}, [&](const Layout& layout) {
    const Gpt gpt(config, Device::cpu(), 1, DType::f32, layout.part());
    gpt.loss(ids, targets, kStep).backward();
    const auto calls = [&](Collective op) { return layout.group->traffic(op).calls; };
    if (!layout.sequence) {
      EXPECT_EQ(calls(Collective::all_reduce), 6 * l + 2);
    } else {
      EXPECT_EQ(calls(Collective::reduce_scatter), 6 * l + 2);
      EXPECT_EQ(calls(Collective::all_gather), (6 * l + 3) + 2 * l + 1);
    }
  });
}

TEST(TensorParallelGpt, SequenceParallelismKeepsFewerActivations) {
  GptConfig config{.layers = 4, .heads = 4, .width = 64, .context = 64, .vocab = 32};
  config.dropout = 0.1;
  const auto ids = [&](const char* name) {
    const RandomStream stream(5, name);
    std::vector<int32_t> values;
    for (uint64_t i = 0; i < 8 * 64; ++i) values.push_back(static_cast<int32_t>(stream.below(i, 32)));
    return Tensor::from(values, {8, 64});
  };
  const Tensor inputs = ids("ids"), targets = ids("targets");
  int64_t kept[2] = {};
  for (const bool sequence : {false, true}) {
    dist::run_threads(4, [&](Group& world) {
      const Gpt gpt(config, Device::cpu(), 1, DType::f32, Layout{&world, sequence}.part());
      world.barrier();
      const auto activations = [] {
        return allocator(Device::cpu())
            .statistics()
            .categories[static_cast<size_t>(MemoryCategory::activations)]
            .current;
      };
      const int64_t before = activations();
      world.barrier();
      const Tensor loss = gpt.loss(inputs, targets);
      world.barrier();
      if (world.rank() == 0) kept[sequence] = activations() - before;
      world.barrier();
      loss.backward();
    });
  }
  std::printf("activations of all ranks: %lld bytes, with sequence parallelism %lld\n", static_cast<long long>(kept[0]),
              static_cast<long long>(kept[1]));
  EXPECT_LT(kept[1], 0.6 * static_cast<double>(kept[0]));
}

// ---- refusals ----

TEST(TensorParallelGpt, WhatItCannotDoIsSaid) {
  const Tensor ids = some_ids("ids");
  GptPart alone;
  alone.sequence = true;
  EXPECT_ERROR(ErrorKind::kValue, "no group is given", Gpt(odd(), Device::cpu(), 1, DType::f32, alone));
  dist::run_threads(2, [&](Group& world) {
    const GptPart part = Layout{&world, false}.part();
    GptConfig config = odd();
    config.heads = 1;
    EXPECT_ERROR(ErrorKind::kValue, "2 ranks, 1 heads", Gpt(config, Device::cpu(), 1, DType::f32, part));
    config.heads = 5, config.vocab = 1;
    EXPECT_ERROR(ErrorKind::kValue, "5 heads and 1 words", Gpt(config, Device::cpu(), 1, DType::f32, part));
    Gpt gpt(odd(), Device::cpu(), 1, DType::bf16, part);
    KvCache cache;
    EXPECT_ERROR(ErrorKind::kState, "logits needs whole layers", gpt.logits(ids));
    EXPECT_ERROR(ErrorKind::kState, "generation needs whole layers", gpt.next_logits(ids, cache));
    EXPECT_ERROR(ErrorKind::kIndex, "the table has 23 rows", gpt.loss(some_ids("ids", 1000), some_ids("ids")));
    optim::Adam adam(gpt.parameters(), {});
    gpt.loss(ids, some_targets()).backward();
    EXPECT_ERROR(ErrorKind::kState, "a part of \"wte.weight\"", adam.step(1e-3));
  });
}

}  // namespace
}  // namespace weft::models
