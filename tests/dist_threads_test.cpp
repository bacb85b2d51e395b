// Groups whose ranks are threads, and the group of one.
#include <gtest/gtest.h>

#include <atomic>
#include <fstream>
#include <mutex>
#include <set>
#include <thread>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "dist/flight_recorder.h"
#include "dist/mesh.h"
#include "dist/threads.h"
#include "ops/matmul.h"
#include "tests/dist_programs.h"
#include "tests/error_of.h"
#include "tests/values.h"

namespace weft::dist {
namespace {

using testing::programs;

class Threads : public ::testing::TestWithParam<std::tuple<int, size_t>> {};

TEST_P(Threads, Conforms) {
  const auto [ranks, which] = GetParam();
  const auto& program = programs()[which];
  if (ranks == 0) {
    Group self = self_group();
    EXPECT_STREQ(self.implementation(), "self");
    program.run(self);
  } else {
    run_threads(ranks, [&](Group& world) { program.run(world); });
  }
}

std::string title(const ::testing::TestParamInfo<std::tuple<int, size_t>>& info) {
  const auto [ranks, which] = info.param;
  return std::string(programs()[which].name) + (ranks == 0 ? "OnSelf" : "On" + std::to_string(ranks));
}

INSTANTIATE_TEST_SUITE_P(Group, Threads,
                         ::testing::Combine(::testing::Values(0, 1, 2, 3, 4, 5, 6, 7, 8),
                                            ::testing::Range<size_t>(0, programs().size())),
                         title);

/// What a world of threads fails with.
std::string failure_of(ErrorKind kind, int ranks, const std::function<void(Group&)>& program) {
  return weft::testing::error_of(kind, [&] { run_threads(ranks, program); });
}

// ---- disagreement ----

/// Runs `program` on three ranks; each must get an error that names all of `parts`, within two seconds.
void expect_disagreement(const std::vector<std::string>& parts, const std::function<void(Group&)>& program) {
  std::mutex mutex;
  std::vector<std::string> errors;
  const auto start = std::chrono::steady_clock::now();
  EXPECT_THROW(run_threads(3,
                           [&](Group& world) {
                             try {
                               program(world);
                             } catch (const GroupError& error) {
                               const std::lock_guard lock(mutex);
                               errors.push_back(error.what());
                               throw;
                             }
                           }),
               GroupError);
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 2);
  EXPECT_EQ(errors.size(), 3u) << "not all ranks were told";
  for (const std::string& error : errors) {
    for (const std::string& part : parts) EXPECT_NE(error.find(part), std::string::npos) << error << "\nlacks " << part;
  }
}

TEST(Disagreement, OtherOperation) {
  expect_disagreement(
      {"different operations", "rank 0: all_reduce #0 of group \"world\", f32 [4], sum, at dist_threads",
       "rank 1: barrier #0", "rank 2: all_reduce #0"},
      [](Group& world) {
        if (world.rank() == 1) return world.barrier();
        world.all_reduce_(Tensor::ones({4}));
      });
}

TEST(Disagreement, OtherDType) {
  expect_disagreement({"dtypes differ", "rank 0: all_reduce #0", "f64 [4]", "f32 [4]"}, [](Group& world) {
    world.all_reduce_(Tensor::ones({4}, world.rank() == 2 ? DType::f64 : DType::f32));
  });
}

TEST(Disagreement, OtherShapeOfTheSameSize) {
  expect_disagreement({"shapes differ", "[2, 3]", "[3, 2]"}, [](Group& world) {
    world.all_reduce_(world.rank() == 1 ? Tensor::ones({3, 2}) : Tensor::ones({2, 3}));
  });
}

TEST(Disagreement, OtherReduction) {
  expect_disagreement({"reductions differ", "sum", "max"}, [](Group& world) {
    world.all_reduce_(Tensor::ones({4}), world.rank() == 1 ? Reduction::max : Reduction::sum);
  });
}

TEST(Disagreement, OtherSource) {
  expect_disagreement({"sources differ", "from rank 0", "from rank 1"},
                      [](Group& world) { world.broadcast_(Tensor::ones({4}), world.rank() == 1); });
}

TEST(Disagreement, OtherCounts) {
  expect_disagreement({"counts differ", "{1, 2, 3}", "{2, 2, 2}"}, [](Group& world) {
    world.reduce_scatter(Tensor::ones({6}), Reduction::sum, world.rank() == 0 ? Counts{1, 2, 3} : Counts{2, 2, 2});
  });
}

TEST(Disagreement, GatheringUnevenRowsWithoutCounts) {
  expect_disagreement({"counts differ", "{2, 2, 2}", "{5, 5, 5}"},
                      [](Group& world) { world.all_gather(Tensor::ones({world.rank() == 1 ? 5 : 2})); });
}

TEST(Disagreement, ExchangeThatDoesNotAddUp) {
  expect_disagreement({"rank 1 sends 2 rows to rank 0, which receives 1"}, [](Group& world) {
    const bool odd = world.rank() == 1;
    world.all_to_all(Tensor::ones({odd ? 4 : 3}), odd ? Counts{2, 1, 1} : Counts{1, 1, 1}, Counts{1, 1, 1});
  });
}

TEST(Disagreement, OtherMembers) {
  expect_disagreement({"circle", "they mean groups of different members by \"odd\""}, [](Group& world) {
    const std::vector<int> members = world.rank() == 1 ? std::vector{0, 1} : std::vector{0, 1, 2};
    Group group = world.subgroup(members, "odd");
    group.barrier();
    world.barrier();
  });
}

TEST(Disagreement, OtherOrderOfTwoGroups) {
  expect_disagreement({"wait for each other in a circle", "rank 0 waits for rank 1 in all_reduce #0 of group \"a\"",
                       "rank 1 waits for rank 0 in all_reduce #0 of group \"b\""},
                      [](Group& world) {
                        const std::vector<int> pair = {0, 1};
                        if (world.rank() == 2) return world.barrier();
                        Group a = world.subgroup(pair, "a"), b = world.subgroup(pair, "b");
                        (world.rank() == 0 ? a : b).all_reduce_(Tensor::ones({4}));
                        (world.rank() == 0 ? b : a).all_reduce_(Tensor::ones({4}));
                      });
}

TEST(Disagreement, EverybodyReceives) {
  expect_disagreement(
      {"circle", "recv #0 of group \"world 1>0\"", "recv #0 of group \"world 2>1\"", "waits for rank 2"},
      [](Group& world) { world.recv_(Tensor::ones({4}), (world.rank() + 1) % 3); });
}

TEST(Disagreement, EverybodySendsAndWaits) {
  expect_disagreement({"circle", "send #0 of group \"world 0>1\""},
                      [](Group& world) { world.send(Tensor::ones({4}), (world.rank() + 1) % 3); });
}

TEST(Disagreement, AReceiverAmongCollectives) {
  expect_disagreement({"circle", "recv #0 of group \"world 1>0\"", "rank 1 waits for rank 0 in barrier #0"},
                      [](Group& world) {
                        if (world.rank() == 0) return world.recv_(Tensor::ones({4}), 1);
                        world.barrier();
                      });
}

TEST(Disagreement, AWaitForAnOperationUnderWay) {
  expect_disagreement({"circle", "rank 0 waits for rank 1 in recv #0"}, [](Group& world) {
    const Tensor t = Tensor::ones({4});
    if (world.rank() == 0) return world.recv_async_(t, 1).wait();
    world.barrier();
  });
}

TEST(Disagreement, AMessageOfAnotherSize) {
  expect_disagreement({"shapes differ", "send #0", "recv #0", "[4]", "[5]"}, [](Group& world) {
    if (world.rank() == 0) return world.send(Tensor::ones({4}), 1);
    if (world.rank() == 1) return world.recv_(Tensor::ones({5}), 0);
    world.barrier();
  });
}

TEST(Disagreement, ARankThatReturnsEarly) {
  const std::string text = failure_of(ErrorKind::kIo, 3, [](Group& world) {
    world.barrier();
    if (world.rank() != 2) world.all_reduce_(Tensor::ones({4}));
  });
  for (const char* part :
       {"rank 2 of 3 has returned from its program", "all_reduce #1", "its last operation was barrier #0"}) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }
}

TEST(Disagreement, ARankThatDoesNotComeInTime) {
  std::atomic<bool> over = false;
  const std::string text = weft::testing::error_of(ErrorKind::kIo, [&] {
    run_threads(2,
                [&](Group& world) {
                  if (world.rank() == 1) {
                    while (!over) std::this_thread::sleep_for(std::chrono::milliseconds(1));
                    return;
                  }
                  try {
                    world.barrier();
                  } catch (const GroupError&) {
                    over = true;
                    throw;
                  }
                },
                {.timeout = 0.2});
  });
  EXPECT_NE(text.find("rank 1 of 2 has not come to barrier #0"), std::string::npos) << text;
}

// ---- exceptions of ranks ----

TEST(RunThreads, TheFirstRealErrorIsRethrownWithItsRank) {
  const std::string text = failure_of(ErrorKind::kShape, 4, [](Group& world) {
    world.barrier();
    if (world.rank() == 2) fail(ErrorKind::kShape, "model", "a shape is wrong");
    world.all_reduce_(Tensor::ones({1000}));
  });
  EXPECT_EQ(text, "rank 2 of 4: [model] a shape is wrong");
}

TEST(RunThreads, OthersAreToldWhoThrewWhat) {
  std::mutex mutex;
  std::vector<std::string> told;
  EXPECT_THROW(run_threads(3,
                           [&](Group& world) {
                             if (world.rank() == 1) throw std::runtime_error("out of luck");
                             try {
                               world.barrier();
                             } catch (const GroupError& error) {
                               EXPECT_EQ(error.rank(), 1);
                               const std::lock_guard lock(mutex);
                               told.push_back(error.what());
                               throw;
                             }
                           }),
               std::runtime_error);
  ASSERT_EQ(told.size(), 2u);
  for (const std::string& text : told)
    EXPECT_NE(text.find("rank 1 of 3 threw: out of luck"), std::string::npos) << text;
}

TEST(RunThreads, AnExceptionWithOperationsUnderWayLeavesNobodyWaiting) {
  for (int round = 0; round < 20; ++round) {
    EXPECT_THROW(run_threads(4,
                             [&](Group& world) {
                               const Tensor t = Tensor::ones({100000});
                               Work work = world.all_reduce_async_(t);
                               if (world.rank() == round % 4) throw std::runtime_error("out of luck");
                               work.wait();
                               world.barrier();
                             }),
                 std::runtime_error);
  }
}

TEST(RunThreads, NoOperationSucceedsAfterAFailure) {
  EXPECT_THROW(run_threads(2,
                           [](Group& world) {
                             EXPECT_THROW(world.all_reduce_(Tensor::ones({2 + world.rank()})), GroupError);
                             EXPECT_THROW(world.barrier(), GroupError);
                             EXPECT_THROW(world.all_reduce_async_(Tensor::ones({2})), GroupError);
                             throw std::runtime_error("seen");
                           }),
               std::runtime_error);
}

TEST(RunThreads, RanksComputeAtTheSameTimeWithTheSameBits) {
  const Tensor a = weft::testing::random({96, 64}, DType::f32, "a"),
               b = weft::testing::random({64, 80}, DType::f32, "b");
  const Tensor want = matmul(a, b);
  const int before = num_threads();
  for (const int threads : {1, 4}) {
    set_num_threads(threads);
    run_threads(5, [&](Group& world) {
      for (int i = 0; i < 30; ++i) {
        if (!weft::testing::same_bits(matmul(a, b), want)) throw std::runtime_error("other bits");
        if (i % 10 == 0) world.barrier();
      }
    });
  }
  set_num_threads(before);
}

TEST(RunThreads, EachRankHasItsOwnAutograd) {
  const autograd::NoGrad no_grad;  // of this thread alone
  run_threads(3, [](Group& world) {
    if (!autograd::grad_mode()) throw std::runtime_error("a rank has inherited NoGrad");
    const Tensor x = Tensor::full({3}, world.rank() + 1).requires_grad_();
    const Tensor y = matmul(x.reshape({1, 3}), x.reshape({3, 1}));
    y.backward(Tensor::ones({1, 1}));
    const Tensor gradient = x.grad();
    world.all_reduce_(gradient);
    if (gradient.to_vector<float>() != std::vector<float>(3, 12)) throw std::runtime_error("a wrong gradient");
  });
}

TEST(RunThreads, WrongNumbersOfRanksAreErrors) {
  EXPECT_ERROR(ErrorKind::kValue, "from 1 to 1024, got 0", run_threads(0, [](Group&) {}));
  EXPECT_ERROR(ErrorKind::kValue, "got 1025", run_threads(1025, [](Group&) {}));
}

// ---- what an operation takes ----

TEST(Arguments, WhatAnOperationDoesNotTakeIsAnErrorBeforeAnybodyIsAsked) {
  Group self = self_group();
  const Tensor t = Tensor::ones({4, 6});
  EXPECT_ERROR(ErrorKind::kShape, "[all_reduce] f32 [6, 4] is not contiguous", self.all_reduce(t.transpose(0, 1)));
  EXPECT_ERROR(ErrorKind::kValue, "undefined tensor", self.all_reduce_(Tensor()));
  EXPECT_ERROR(ErrorKind::kDType, "reduces f32, f64", self.all_reduce_(Tensor::ones({2}, DType::boolean)));
  EXPECT_ERROR(ErrorKind::kDType, "reduces f32, f64", self.reduce_scatter(Tensor::ones({2}, DType::f8e4m3)));
  EXPECT_ERROR(ErrorKind::kValue, "avg is for float dtypes",
               self.all_reduce_(Tensor::ones({2}, DType::i32), Reduction::avg));
  EXPECT_ERROR(ErrorKind::kShape, "the output must be [4, 6]", self.all_reduce_async(t, Tensor::ones({4})));
  EXPECT_ERROR(ErrorKind::kDType, "the output f64", self.all_reduce_async(t, Tensor::ones({4, 6}, DType::f64)));
  EXPECT_ERROR(ErrorKind::kValue, "share memory", self.all_reduce_async(t.narrow(0, 0, 3), t.narrow(0, 1, 3)));
  EXPECT_ERROR(ErrorKind::kValue, "share memory", self.all_reduce_async(t, t.narrow(0, 0, 4)));
  EXPECT_ERROR(ErrorKind::kShape, "Hint: reshape({1})", self.all_gather(Tensor::ones({})));
  EXPECT_ERROR(ErrorKind::kValue, "2 counts for 1 ranks", self.all_gather(t, {2, 2}));
  EXPECT_ERROR(ErrorKind::kValue, "must not be negative", self.reduce_scatter(t, Reduction::sum, {-4}));
  EXPECT_ERROR(ErrorKind::kShape, "add up to 3 rows, but the input has 4", self.reduce_scatter(t, Reduction::sum, {3}));
  EXPECT_ERROR(ErrorKind::kShape, "but its input has 4 rows", self.all_gather(t, {3}));
  EXPECT_ERROR(ErrorKind::kValue, "need counts to receive", self.all_to_all(t, {4}));
  EXPECT_ERROR(ErrorKind::kValue, "rank 1 is not one of the 1 ranks", self.broadcast_(t, 1));
  EXPECT_ERROR(ErrorKind::kValue, "is this rank itself", self.send(t, 0));
  EXPECT_ERROR(ErrorKind::kState, "takes part in a graph", self.all_reduce(Tensor::ones({2}).requires_grad_()));
  EXPECT_ERROR(ErrorKind::kState, "takes part in a graph", self.all_reduce_(Tensor::ones({2}).requires_grad_()));
  run_threads(2, [](Group& world) {
    const Tensor t = Tensor::ones({2}).requires_grad_();
    EXPECT_ERROR(ErrorKind::kState, "takes part in a graph", world.send(t, 1 - world.rank()));
  });
  {
    const autograd::NoGrad no_grad;
    EXPECT_NO_THROW(self.all_reduce(Tensor::ones({2}).requires_grad_()));
  }
  {
    const DryRun dry;
    const Tensor planned = Tensor::empty({4});
    EXPECT_ERROR(ErrorKind::kState, "dry run", self.all_reduce_(planned));
  }
  EXPECT_NO_THROW(self.barrier());
  run_threads(3, [](Group& world) {
    EXPECT_ERROR(ErrorKind::kValue, "powers of two", world.all_reduce_(Tensor::ones({2}), Reduction::avg));
    EXPECT_ERROR(ErrorKind::kShape, "does not divide by the 3 ranks", world.reduce_scatter(Tensor::ones({4})));
    EXPECT_ERROR(ErrorKind::kShape, "does not divide by the 3 ranks", world.all_to_all(Tensor::ones({4})));
    world.barrier();
  });
}

TEST(Arguments, AnInPlaceOperationCountsAsAChange) {
  Group self = self_group();
  const Tensor t = Tensor::ones({4});
  const uint64_t before = t.storage()->version();
  self.all_reduce_(t);
  EXPECT_GT(t.storage()->version(), before);
  self.all_reduce(t);
  EXPECT_EQ(t.storage()->version(), before + 1);
}

TEST(Arguments, GroupsAreCheckedWhenTheyAreMade) {
  run_threads(3, [](Group& world) {
    const std::vector<int> twice = {0, 0}, outside = {0, 3}, all = {0, 1, 2};
    const std::vector<int> others = {(world.rank() + 1) % 3};
    EXPECT_ERROR(ErrorKind::kValue, "names rank 0 twice", world.subgroup(twice, "x"));
    EXPECT_ERROR(ErrorKind::kValue, "names rank 3", world.subgroup(outside, "x"));
    EXPECT_ERROR(ErrorKind::kValue, "is not a member", world.subgroup(others, "x"));
    EXPECT_ERROR(ErrorKind::kValue, "a mesh of 4 ranks does not cover", world.subgroup(Mesh({4, 1, 1, 1}), kAllAxes));
    Group first = world.subgroup(all, "x");
    EXPECT_ERROR(ErrorKind::kState, "a group named \"x\" is alive", world.subgroup(all, "x"));
    first.barrier();
    first = world.subgroup(all, "y");
    Group again = world.subgroup(all, "x");  // the name is free again
    again.barrier();
    first.barrier();
  });
}

// ---- the flight recorder ----

TEST(Traffic, CountsTheTimeInWhichARankStandsStillForOthers) {
  run_threads(2, [](Group& world) {
    const Tensor t = Tensor::ones({1});
    const auto late = [&](double seconds) {
      if (world.rank() == 1) std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    };
    world.barrier();
    late(0.2);
    world.all_reduce_(t);
    late(0.2);
    const Work work = world.all_reduce_async_(t);
    work.wait();
    work.wait();  // the second time costs nothing
    const double waited = world.traffic(Collective::all_reduce).waited;
    if (world.rank() == 0) {
      EXPECT_GT(waited, 0.38);
    }
    // Whoever does something else meanwhile does not stand still.
    world.barrier();
    const Work behind = world.all_reduce_async_(t);
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    while (!behind.done()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    behind.wait();
    EXPECT_EQ(world.traffic(Collective::all_reduce).waited, waited);
  });
}

TEST(FlightRecorder, HoldsTheLastThousandOperations) {
  FlightRecorder recorder;
  Stamp stamp;
  stamp.lane = "world";
  stamp.place = "here";
  for (int i = 0; i < 1500; ++i) {
    stamp.sequence = static_cast<uint64_t>(i);
    const uint64_t id = recorder.issued(0, stamp);
    recorder.matched(id);
    if (i < 1499) recorder.finished(id, true);
  }
  recorder.finished(3, false);  // overwritten long ago
  const std::string text = recorder.text();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1000);
  EXPECT_NE(text.find("#500 "), std::string::npos);
  EXPECT_EQ(text.find("#499 "), std::string::npos);
  EXPECT_NE(text.rfind("moves"), std::string::npos);
  EXPECT_EQ(text.find("failed"), std::string::npos);
  EXPECT_EQ(recorder.count(), 1500u);
}

TEST(FlightRecorder, IsWrittenToItsFileAtTheFirstFailure) {
  const std::string path = ::testing::TempDir() + "flight_record_" + std::to_string(::getpid());
  EXPECT_THROW(run_threads(2,
                           [](Group& world) {
                             for (int i = 0; i < 5; ++i) world.barrier();
                             world.all_reduce_(Tensor::ones({2 + world.rank()}));
                           },
                           {.flight_record = path}),
               GroupError);
  std::ifstream in(path);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  std::remove(path.c_str());
  EXPECT_NE(text.find("ranks do not agree on operation #5"), std::string::npos) << text;
  EXPECT_NE(text.find("rank 0 done"), std::string::npos) << text;
  EXPECT_NE(text.find("barrier #4 of group \"world\", at dist_threads_test.cpp:"), std::string::npos) << text;
  EXPECT_NE(text.find("waits"), std::string::npos) << text;
}

}  // namespace
}  // namespace weft::dist
