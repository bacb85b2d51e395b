#include "apps/bench_ratios.h"

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "apps/columns.h"
#include "apps/files.h"
#include "core/file.h"
#include "models/speed_of_light.h"

namespace weft::apps {
namespace {

std::string percent(double ratio) { return fixed(100 * ratio, 1) + "%"; }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

Rounds turns(int64_t rounds, const std::function<double(const std::function<void()>&)>& time,
             const std::function<void()>& ours, const std::function<void()>& other) {
  time(ours);
  time(other);
  Rounds taken;
  for (int64_t i = 0; i < rounds; ++i) {
    taken.ours.push_back(time(ours));
    taken.other.push_back(time(other));
  }
  return taken;
}

}  // namespace

void RatioOptions::declare(Options& o) {
  o.add("rounds", &rounds, {.min = 1, .max = 1000}, "how often each is measured, in turns");
  o.add("json", &json, {.placeholder = "FILE"}, "write the rows there as JSON as well");
  o.action("quick", &quick, "tiny sizes and two rounds: whether everything runs, not how fast");
}

double Rounds::ours_median() const { return median(ours); }
double Rounds::other_median() const { return median(other); }

std::vector<double> Rounds::ratios() const {
  std::vector<double> ratios;
  for (size_t i = 0; i < ours.size(); ++i) ratios.push_back(other[i] / std::max(ours[i], 1e-9));
  std::sort(ratios.begin(), ratios.end());
  return ratios;
}

Rounds take_turns(dist::Group& world, int64_t rounds, const std::function<void()>& ours,
                  const std::function<void()>& other) {
  const auto time = [&](const std::function<void()>& work) {
    world.barrier();
    const double begin = steady_seconds();
    work();
    const Tensor seconds = Tensor::from(std::vector<double>{steady_seconds() - begin}, {1});
    world.all_reduce_(seconds, dist::Reduction::max);
    return seconds.item();
  };
  return turns(rounds, time, ours, other);
}

Rounds take_turns(int64_t rounds, const std::function<void()>& ours, const std::function<void()>& other) {
  const auto time = [](const std::function<void()>& work) {
    const double begin = steady_seconds();
    work();
    return steady_seconds() - begin;
  };
  return turns(rounds, time, ours, other);
}

std::string bytes_per_second(double bytes, double seconds) {
  const double rate = bytes / std::max(seconds, 1e-9);
  return rate >= 1e9 ? fixed(rate * 1e-9, 2) + " GB/s" : fixed(rate * 1e-6, 1) + " MB/s";
}

RatioTable::RatioTable(std::string command, const RatioOptions& options)
    : command_(std::move(command)), options_(options) {
  if (!options.json.empty()) check_writable(options.json.string());
  std::cout << left("case", 46) << right("measured", 18) << right("against", 34) << right("ratio", 9)
            << right("[quartiles]", 18) << right("wanted", 11) << std::endl;
}

void RatioTable::add(RatioRow row) {
  const size_t n = row.ratios.size();
  const std::string wanted = row.at_least  ? ">= " + percent(*row.at_least)
                             : row.at_most ? "<= " + percent(*row.at_most)
                                           : "";
  const std::string spread =
      n > 2 ? concat("[", fixed(100 * row.ratios[n / 4], 1), ", ", fixed(100 * row.ratios[3 * n / 4], 1), "]") : "";
  std::cout << left(row.name, 46) << right(row.figure, 18) << right(row.denominator, 34)
            << right(percent(row.median()), 9) << right(spread, 18) << right(wanted, 11) << std::endl;
  rows_.push_back(std::move(row));
}

void RatioTable::finish() {
  if (options_.json.empty()) return;
  nlohmann::json rows = nlohmann::json::array();
  for (const RatioRow& row : rows_) {
    nlohmann::json entry = {{"case", row.name},
                            {"measured", row.figure},
                            {"against", row.denominator},
                            {"ratio", row.median()},
                            {"ratios", row.ratios}};
    if (row.at_least) entry["at_least"] = *row.at_least;
    if (row.at_most) entry["at_most"] = *row.at_most;
    rows.push_back(std::move(entry));
  }
  const nlohmann::json all = {{"command", command_}, {"quick", options_.quick}, {"rows", std::move(rows)}};
  write_file_atomic(options_.json.string(), as_bytes(all.dump(2) + "\n"));
  std::cout << "written: " << options_.json.string() << std::endl;
}

}  // namespace weft::apps
