// weft bench collectives: the operations of a group of processes against Gloo's own on the same transport, and those of
// a group of threads against a copy.
#include <cstring>
#include <iostream>

#include "apps/bare_gloo.h"
#include "apps/bench.h"
#include "apps/bench_processes.h"
#include "apps/bench_ratios.h"
#include "apps/files.h"
#include "core/thread_pool.h"
#include "dist/processes.h"
#include "dist/threads.h"

namespace weft::apps {
namespace {

constexpr double kPlainShare = 0.9, kCopyShare = 0.5;

/// What a rank sends in an operation on tensors of `bytes`, as docs/parallelism/groups.md counts.
struct Case {
  const char* name;
  double sent;    ///< by each rank, in shares of the tensor, of two ranks
  double passes;  ///< reads and writes of memory by both ranks that read each other's tensors, in shares of the tensor
};
constexpr Case kReduce = {"all_reduce", 1, 4}, kScatter = {"reduce_scatter", 0.5, 3}, kGather = {"all_gather", 0.5, 4};

std::string title(const Case& of, int64_t bytes, const char* where) {
  return concat(of.name, ", ", fixed(static_cast<double>(bytes) * 1e-6, bytes < 10000000 ? 1 : 0), " MB, 2 ", where);
}

/// Tensors of one rank.
struct Buffers {
  explicit Buffers(int64_t elements)
      : whole(Tensor::ones({elements})), part(Tensor::ones({elements / 2})), gathered(Tensor::ones({elements})) {}
  Tensor whole, part, gathered;
  float* data(const Tensor& t) const { return static_cast<float*>(t.raw()); }
};

/// The rows of processes; rank 0's table.
void processes(dist::Group& world, BareGloo& bare, int64_t elements, const RatioOptions& o, RatioTable* table) {
  const Buffers b(elements);
  const int64_t bytes = elements * 4;
  const auto row = [&](const Case& of, const std::function<void()>& ours, const std::function<void()>& plain) {
    const Rounds rounds = take_turns(world, o.count(), ours, plain);
    const double sent = of.sent * static_cast<double>(bytes);
    if (table == nullptr) return;
    table->add({title(of, bytes, "processes"), bytes_per_second(sent, rounds.ours_median()),
                "plain Gloo " + bytes_per_second(sent, rounds.other_median()), rounds.ratios(), kPlainShare});
  };
  row(kReduce, [&] { world.all_reduce_(b.whole); }, [&] { bare.all_reduce(b.data(b.whole), elements); });
  row(
      kScatter, [&] { world.reduce_scatter_async(b.whole, b.part).wait(); },
      [&] { bare.reduce_scatter(b.data(b.whole), elements); });
  row(
      kGather, [&] { world.all_gather_async(b.part, b.gathered).wait(); },
      [&] { bare.all_gather(b.data(b.part), b.data(b.gathered), elements / 2); });
}

/// The rows of threads, each of whose operations is followed by a copy of `elements` on all of the pool's threads.
void threads(int64_t elements, const RatioOptions& o, RatioTable& table) {
  const int64_t bytes = elements * 4;
  const Tensor from = Tensor::ones({elements}), to = Tensor::ones({elements});
  const auto copy = [&] {
    parallel_for(bytes, int64_t{1} << 20, [&](int64_t begin, int64_t end) {
      std::memcpy(static_cast<char*>(to.raw()) + begin, static_cast<const char*>(from.raw()) + begin,
                  static_cast<size_t>(end - begin));
    });
  };
  dist::run_threads(2, [&](dist::Group& world) {
    const Buffers b(elements);
    const auto row = [&](const Case& of, const std::function<void()>& ours) {
      // A copy reads and writes every byte once: two passes.
      const Rounds rounds = take_turns(world, o.count(), ours, [&] {
        if (world.rank() == 0) copy();
      });
      if (world.rank() != 0) return;
      const double moved = of.passes * static_cast<double>(bytes), copied = 2 * static_cast<double>(bytes);
      std::vector<double> shares = rounds.ratios();
      for (double& share : shares) share *= moved / copied;
      table.add({title(of, bytes, "threads"), bytes_per_second(moved, rounds.ours_median()),
                 "copy " + bytes_per_second(copied, rounds.other_median()), shares, kCopyShare});
    };
    row(kReduce, [&] { world.all_reduce_(b.whole); });
    row(kScatter, [&] { world.reduce_scatter_async(b.whole, b.part).wait(); });
    row(kGather, [&] { world.all_gather_async(b.part, b.gathered).wait(); });
  });
}

}  // namespace

int bench_collectives(std::span<const std::string> args) {
  RatioOptions o;
  int64_t megabytes = 64;
  Options options("bench collectives",
                  "Times collectives of two processes against Gloo's own on plain buffers, in turns, and those of two "
                  "threads against a copy.");
  o.declare(options);
  options.add("megabytes", &megabytes, {.min = 1, .max = 4096, .unit = "MB"}, "of the whole tensor");
  if (!options.parse(args)) return 0;
  RatioTable table("bench collectives", o);
  const int64_t elements = o.quick ? 50000 : megabytes * 250000;
  if (*dist::why_no_gloo() == '\0') {
    run_processes(2, [&](dist::Group& world, const std::filesystem::path& directory) {
      BareGloo bare(world.rank(), world.size(), directory / "bare");
      processes(world, bare, elements, o, world.rank() == 0 ? &table : nullptr);
    });
  } else {
    std::cout << "processes: " << dist::why_no_gloo() << "\n";
  }
  threads(elements, o, table);
  table.finish();
  return 0;
}

}  // namespace weft::apps
