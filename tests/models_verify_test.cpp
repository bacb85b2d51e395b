// Every layout trains as one rank does.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/disturbed_training.h"
#include "tests/verification.h"

namespace weft::models {
namespace {

using dist::Collective;
using dist::Engine;
using dist::Mesh;
using dist::Operation;
using dist::Zero;

TEST(Verify, ALayoutOfEverythingIsEqualInEveryBitAndAnotherMeshGoesOnFromIt) {
  Verification v = verification("dp=2,pp=2", Zero::kGradients);
  v.problem.adam.trust_ratio = true, v.problem.config.recompute.block = true;
  ParallelOptions next;
  next.mesh = Mesh::parse("dp=3"), next.zero = Zero::kOptimizer;
  v.layouts.push_back(next);
  const VerifyReport report = verify(v);
  EXPECT_TRUE(report.equal()) << text_of(v, report);
  EXPECT_TRUE(report.exact);
  // 8 losses, 4 ranks and then 3, 2 steps each.
  EXPECT_EQ(report.tallies[static_cast<size_t>(Compared::kLoss)].tensors, 8 * (4 + 3) * 2);
  for (const VerifyReport::Tally& tally : report.tallies) {
    EXPECT_GT(tally.elements, 0);
    EXPECT_EQ(tally.different, 0);
  }
  EXPECT_NE(text_of(v, report).find("equal in every bit"), std::string::npos);
}

TEST(Verify, TensorAndContextParallelismStayWithinBoundsThatAreNotFarAway) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    Verification v = verification("cp=2,tp=2", Zero::kNone);
    v.problem.dtype = dtype, v.problem.adam.trust_ratio = true;
    const VerifyReport report = verify(v);
    EXPECT_TRUE(report.equal()) << text_of(v, report);
    EXPECT_FALSE(report.exact);
    // Something was rounded otherwise, and a gradient's bound is no more than a few units of its precision.
    bool gradients = false;
    for (const BoundedError& error : report.errors) gradients = gradients || error.difference > 0;
    EXPECT_TRUE(gradients);
    const double unit = dtype == DType::f64 ? 0x1p-53 : dtype == DType::f32 ? 0x1p-24 : 0x1p-8;
    for (const BoundedError& error : report.errors) {
      if (error.what == Compared::kLoss) {
        EXPECT_LT(error.bound, 200 * unit * std::log(29.0));
      }
    }
  }
}

TEST(Verify, WhatChangesNoNumberIsNoDifference) {
  // Residual stream and branch change places between two stages: only their sum is used.
  const auto last = std::make_shared<Tensor>();
  const TrainingHooks hooks = engine_of(1, [last](const Operation& op, Engine& engine) {
    const int64_t sent = engine.run(op);
    if (op.stamp.op != Collective::recv) return sent;
    if (!last->defined()) {
      *last = op.output;
      return sent;
    }
    const Bytes first = content(*last), second = content(op.output);
    write(*last, second), write(op.output, first);
    *last = {};
    return sent;
  });
  const Verification v = verification("pp=2");
  const VerifyReport report = verify(v, &hooks);
  EXPECT_TRUE(report.equal()) << text_of(v, report);
}

}  // namespace
}  // namespace weft::models
