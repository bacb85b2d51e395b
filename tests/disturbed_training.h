#pragma once
#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "dist/engine.h"
#include "models/verify/verify.h"

// Hooks that make a rank of a verified layout do other than it should.

namespace weft::models {

/// Runs operations of one rank in another way than they should.
class Disturbed final : public dist::Engine {
 public:
  using Run = std::function<int64_t(const dist::Operation& op, dist::Engine& engine)>;
  Disturbed(std::shared_ptr<dist::Engine> engine, Run run)
      : Engine(std::shared_ptr<dist::Board>(engine, &engine->board()), engine->rank()),
        engine_(std::move(engine)),
        run_(std::move(run)) {}
  const char* name() const override { return engine_->name(); }
  Device device() const override { return engine_->device(); }
  int64_t run(const dist::Operation& op) override { return run_(op, *engine_); }

 private:
  std::shared_ptr<dist::Engine> engine_;
  Run run_;
};

using Bytes = std::vector<std::byte>;
inline int64_t bytes_of(const Tensor& t) { return t.numel() * size_of(t.dtype()); }
inline Bytes content(const Tensor& t) {
  const auto* begin = static_cast<const std::byte*>(t.raw());
  return {begin, begin + bytes_of(t)};
}
inline void write(const Tensor& t, const Bytes& bytes) { std::memcpy(t.raw(), bytes.data(), bytes.size()); }

/// Hooks that disturb a rank's operations.
inline TrainingHooks engine_of(int rank, Disturbed::Run run) {
  TrainingHooks hooks;
  hooks.engine = [rank, run](std::shared_ptr<dist::Engine> engine) -> std::shared_ptr<dist::Engine> {
    if (engine->rank() != rank) return engine;
    return std::make_shared<Disturbed>(std::move(engine), run);
  };
  return hooks;
}
/// The same, counting: a step that is run once more counts anew.
inline TrainingHooks counting_engine_of(
    int rank, std::function<int64_t(const dist::Operation& op, dist::Engine& engine, int& count)> run) {
  TrainingHooks hooks;
  hooks.engine = [rank, run](std::shared_ptr<dist::Engine> engine) -> std::shared_ptr<dist::Engine> {
    if (engine->rank() != rank) return engine;
    const auto count = std::make_shared<int>(0);
    return std::make_shared<Disturbed>(std::move(engine), [run, count](const dist::Operation& op, dist::Engine& inner) {
      return run(op, inner, *count);
    });
  };
  return hooks;
}
inline TrainingHooks micro_batches_of(int rank, std::function<void(int64_t j, MicroBatch&, GptStep&)> change) {
  TrainingHooks hooks;
  hooks.micro_batch = [rank, change](int at, int64_t, int64_t j, MicroBatch& batch, GptStep& step) {
    if (rank < 0 || at == rank) change(j, batch, step);
  };
  return hooks;
}
inline TrainingHooks moments_of(int rank, TrainingMoment moment, std::function<void(const RankView&)> change) {
  TrainingHooks hooks;
  hooks.at = [rank, moment, change](TrainingMoment now, const RankView& view) {
    if ((rank < 0 || view.rank == rank) && now == moment) change(view);
  };
  return hooks;
}

/// Adds up as another reducer does, and then answers with something else.
class WrongNorms final : public optim::NormReducer {
 public:
  using Change = std::function<void(std::span<optim::ExactSum> reduced, std::span<const optim::ExactSum> own,
                                    const Parameters& parameters)>;
  WrongNorms(std::shared_ptr<optim::NormReducer> norms, Change change, bool complete = true)
      : norms_(std::move(norms)), change_(std::move(change)), complete_(complete) {}
  bool exact() const override { return true; }
  void reduce(std::span<double> squares, const Parameters& parameters) override { norms_->reduce(squares, parameters); }
  void reduce(std::span<optim::ExactSum> squares, const Parameters& parameters) override {
    const std::vector<optim::ExactSum> own(squares.begin(), squares.end());
    norms_->reduce(squares, parameters);
    if (change_) change_(squares, own, parameters);
  }
  void complete(std::vector<double>& squares, const Parameters& parameters) override {
    std::vector<double> all = squares;
    norms_->complete(all, parameters);
    if (complete_) squares = all;
  }

 private:
  std::shared_ptr<optim::NormReducer> norms_;
  Change change_;
  bool complete_;
};
inline TrainingHooks norms_of(int rank, WrongNorms::Change change, bool complete = true) {
  TrainingHooks hooks;
  hooks.norms = [=](int at, std::shared_ptr<optim::NormReducer> norms) -> std::shared_ptr<optim::NormReducer> {
    if (rank >= 0 && at != rank) return norms;
    return std::make_shared<WrongNorms>(std::move(norms), change, complete);
  };
  return hooks;
}
inline const auto kOwnSums = [](std::span<optim::ExactSum> reduced, std::span<const optim::ExactSum> own,
                                const Parameters&) { std::copy(own.begin(), own.end(), reduced.begin()); };

inline const Tensor& parameter(const Parameters& parameters, const std::string& name) {
  for (const Parameter& candidate : parameters) {
    if (candidate.name == name) return candidate.tensor;
  }
  throw std::runtime_error("no parameter " + name);
}

}  // namespace weft::models
