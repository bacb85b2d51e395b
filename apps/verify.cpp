// weft verify: whether a layout trains as one rank does.
#include <algorithm>
#include <iomanip>
#include <iostream>

#include "apps/commands.h"
#include "apps/files.h"
#include "apps/verify_options.h"

namespace weft::apps {
namespace {

std::string command_line(const std::vector<std::string>& arguments) {
  std::string line = "weft verify";
  for (const std::string& argument : arguments) line += ' ' + (argument.empty() ? "''" : argument);
  return line;
}

/// Random comparisons one after the other; whether all were equal.
bool fuzz(int64_t count, int64_t seed) {
  const double begin = steady_seconds();
  int64_t different = 0, bounded = 0;
  double largest = 0;
  for (int64_t number = 0; number < count; ++number) {
    const std::vector<std::string> arguments = random_arguments(seed, number);
    const double start = steady_seconds();
    std::string verdict = "equal";
    std::ostringstream details;
    try {
      const models::Verification verification = verification_of(arguments);
      const models::VerifyReport report = models::verify(verification);
      bounded += report.equal() && !report.exact;
      for (const models::BoundedError& error : report.errors) {
        if (report.equal()) largest = std::max(largest, error.ratio());
      }
      if (report.equal() && !report.exact) verdict = "bounded";
      if (!report.equal()) {
        verdict = "DIFFERENT";
        models::print_report(details, verification, report, false);
      }
    } catch (const Error& error) {
      verdict = "FAILED";
      details << error.what() << "\n";
    }
    different += verdict == "DIFFERENT" || verdict == "FAILED";
    std::cout << std::setw(4) << number + 1 << "  " << std::left << std::setw(9) << verdict << std::right << "  "
              << fixed(steady_seconds() - start, 2) << " s  " << command_line(arguments) << "\n"
              << details.str() << std::flush;
  }
  std::cout << count << " comparisons in " << fixed(steady_seconds() - begin, 1)
            << " s: " << count - bounded - different << " equal in every bit, " << bounded << " within their bounds";
  if (bounded > 0) std::cout << " (the largest error is " << fixed(largest, 2) << " of its bound)";
  std::cout << ", " << different << " different\n";
  return different == 0;
}

}  // namespace

int run_verify(std::span<const std::string> args) {
  VerifyOptions o;
  int64_t count = 0;
  bool all_errors = false;
  Options options("verify",
                  "Trains a small model on a layout of ranks and on one rank, on the same made-up data, and compares "
                  "losses, gradients, norms, parameters and optimizer state of every step. Ranks are threads of this "
                  "process. Exit code 0: equal, 1: different.");
  o.declare(options);
  options.section("comparison", "The comparison");
  options.add("fuzz", &count, {.min = 0, .max = 1 << 20, .unit = "comparisons"},
              "make this many random comparisons instead; each prints the command that repeats it");
  options.add("tensors", &all_errors, "where numbers may differ: print every tensor's error");
  if (!options.parse(args)) return 0;
  if (count > 0) {
    for (const std::string& name : options.names()) {
      if (name != "seed" && name != "fuzz" && options.given(name))
        options.reject(name, "is one comparison's: --fuzz makes its own");
    }
    return fuzz(count, o.seed) ? 0 : 1;
  }
  const models::Verification verification = o.verification(options);
  for (const models::ParallelOptions& layout : verification.layouts)
    std::cout << layout.mesh.size() << " ranks, mesh " << quoted(layout.mesh.to_string())
              << ", against one: " << verification.steps << " steps of " << o.accumulate << " micro-batches\n";
  const models::VerifyReport report = models::verify(verification);
  models::print_report(std::cout, verification, report, all_errors);
  return report.equal() ? 0 : 1;
}

}  // namespace weft::apps
