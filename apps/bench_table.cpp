#include "apps/bench_table.h"

#include <unistd.h>

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "apps/columns.h"
#include "apps/files.h"
#include "core/backend.h"
#include "core/file.h"
#include "core/memory.h"
#include "core/thread_pool.h"
#include "ops/gemm.h"

namespace weft::apps {
namespace {

/// "12.3 GB", "1.05 TFLOP": three digits that count, with the prefix that fits.
std::string amount_text(double amount, const char* unit) {
  const char* prefix = "";
  for (const char* next : {"k", "M", "G", "T", "P"}) {
    if (amount < 999.5) break;
    amount /= 1000;
    prefix = next;
  }
  return concat(fixed(amount, amount < 9.995 ? 2 : amount < 99.95 ? 1 : 0), ' ', prefix, unit);
}

}  // namespace

void BenchOptions::declare(Options& o) {
  device.declare(o);
  o.add("precision", &precision, {{"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}},
        "of tensors; sums are kept in f32");
  o.add("threads", &threads, {.min = 0, .max = 1024}, "threads; 0: as many as the process may use");
  o.add("seconds", &seconds, {.min = 0, .max = 3600}, "time for each row, beyond the five rounds it has at least");
  o.add("json", &json, {.placeholder = "FILE"}, "write the rows there as JSON as well");
  o.action("quick", &quick, "tiny sizes and five rounds: whether everything runs, not how fast");
}

Device BenchOptions::start(const Options& options) const {
  if (!json.empty()) check_writable(json.string());
  if (threads > 0) set_num_threads(static_cast<int>(threads));
  return device.device(options);
}

Timing time_of(Device device, double seconds, const std::function<void()>& work) {
  constexpr double kRound = 5e-3;
  constexpr size_t kFewest = 5, kMost = 10000;
  Backend& on = backend(device);
  on.seconds_of(work);  // memory is had from the system here, and a GPU's kernels are loaded
  const double once = std::max(on.seconds_of(work), 1e-9);
  const int calls = static_cast<int>(std::clamp(kRound / once, 1.0, 1000.0));
  std::vector<double> rounds;
  for (const double begin = steady_seconds(); rounds.size() < kFewest || steady_seconds() - begin < seconds;) {
    rounds.push_back(on.seconds_of([&] {
      for (int i = 0; i < calls; ++i) work();
    }) / calls);
    if (rounds.size() == kMost) break;
  }
  std::sort(rounds.begin(), rounds.end());
  return {rounds[rounds.size() / 2], rounds.front()};
}

BenchTable::BenchTable(std::string command, const BenchOptions& options, Device device, int64_t rows)
    : command_(std::move(command)),
      options_(options),
      device_(device),
      peaks_(models::speed_now(device, options.precision, options.quick)) {
  const bool cpu = device.kind == DeviceKind::cpu;
  const std::string where = cpu ? concat(peaks_.name, ", ", peaks_.threads, " threads, ", gemm_isa(), " kernels")
                                : concat(peaks_.name, " (", device, ")");
  std::cout << where << ", " << options.precision << "; measured now: products " << fixed(peaks_.gemm_flops * 1e-9, 1)
            << " GFLOP/s, copy " << fixed(peaks_.copy_bytes * 1e-9, 1) << " GB/s read plus written\n"
            << left("case", 46) << left("pass", 10) << right("amount", 12) << right("median us", 12)
            << right("best us", 12) << right("rate", 15) << right("of peak", 9) << std::endl;
  // On a terminal the rows themselves tell how far it is.
  if (isatty(STDOUT_FILENO) == 0) progress_.emplace(ProgressOptions{.title = command_, .total = rows});
}

Timing BenchTable::measure(const std::string& name, const std::string& pass, const Work& amount,
                           const std::function<void()>& work) {
  const Timing time = time_of(device_, options_.quick ? 0 : options_.seconds, work);
  const bool flops = amount.flops > 0;
  const double total = flops ? amount.flops : amount.bytes, rate = total / time.median,
               percent = 100 * rate / (flops ? peaks_.gemm_flops : peaks_.copy_bytes);
  std::cout << left(name, 46) << left(pass, 10) << right(amount_text(total, flops ? "FLOP" : "B"), 12)
            << right(fixed(time.median * 1e6, 1), 12) << right(fixed(time.best * 1e6, 1), 12)
            << right(amount_text(rate, flops ? "FLOP/s" : "B/s"), 15) << right(fixed(percent, 1) + "%", 9) << std::endl;
  rows_.push_back({name, pass, amount, time, percent});
  if (progress_) progress_->update(static_cast<int64_t>(rows_.size()), name);
  return time;
}

void BenchTable::finish() {
  if (progress_) progress_->finish();
  options_.device.report(device_);
  if (options_.json.empty()) return;
  nlohmann::json rows = nlohmann::json::array();
  for (const Row& row : rows_) {
    rows.push_back({{"case", row.name},
                    {"pass", row.pass},
                    {"bytes", row.amount.bytes},
                    {"flops", row.amount.flops},
                    {"seconds", row.time.median},
                    {"best_seconds", row.time.best},
                    {"percent_of_peak", row.percent}});
  }
  const nlohmann::json all = {
      {"command", command_},       {"device", peaks_.name},           {"precision", concat(options_.precision)},
      {"threads", peaks_.threads}, {"gemm_flops", peaks_.gemm_flops}, {"copy_bytes", peaks_.copy_bytes},
      {"rows", std::move(rows)}};
  write_file_atomic(options_.json.string(), as_bytes(all.dump(2) + "\n"));
  std::cout << "written: " << options_.json.string() << std::endl;
}

}  // namespace weft::apps
