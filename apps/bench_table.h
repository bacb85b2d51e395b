#pragma once
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "apps/device_option.h"
#include "apps/options.h"
#include "apps/progress.h"
#include "models/speed_of_light.h"

// What `weft bench ops`, `attention` and `gemm` have in common.

namespace weft::apps {

/// Options of a benchmark that prints a table.
struct BenchOptions {
  DeviceOption device;
  DType precision = DType::f32;
  int64_t threads = 0;
  double seconds = 0.3;
  std::filesystem::path json;
  bool quick = false;

  void declare(Options& options);
  /// The device, with the number of threads set. @throws Error kUsage, kDevice, kIo for a JSON file that cannot be
  /// made.
  Device start(const Options& options) const;
};

/// Seconds of one call.
struct Timing {
  double median = 0, best = 0;
};

/// Times calls of work(): one that is not counted, then rounds of so many calls that a round takes 5 ms, at least five
/// rounds and until `seconds` have passed. On a GPU, between events on its stream.
Timing time_of(Device device, double seconds, const std::function<void()>& work);

/// What one call must do at least, counted by formula: each input read once and each output written once, and the
/// floating-point operations where those are its measure.
struct Work {
  double bytes = 0, flops = 0;
};

/// Prints one line for each measurement, with its share of a peak that was measured first: FLOP/s against the product
/// of random numbers, bytes/s against the copy.
class BenchTable {
 public:
  /// Measures the two peaks and prints the heading. @param rows  how many will come, for the progress on a terminal
  BenchTable(std::string command, const BenchOptions& options, Device device, int64_t rows);

  /// Times work() and prints its line.
  Timing measure(const std::string& name, const std::string& pass, const Work& amount,
                 const std::function<void()>& work);
  const models::MachineSpeed& peaks() const { return peaks_; }
  /// Writes the JSON file, if one was asked for.
  void finish();

 private:
  struct Row {
    std::string name, pass;
    Work amount;
    Timing time;
    double percent;
  };

  const std::string command_;
  const BenchOptions& options_;
  const Device device_;
  const models::MachineSpeed peaks_;
  std::vector<Row> rows_;
  std::optional<Progress> progress_;
};

}  // namespace weft::apps
