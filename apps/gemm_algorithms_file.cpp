#include "apps/gemm_algorithms_file.h"

#include <nlohmann/json.hpp>
#include <vector>

#include "apps/files.h"
#include "core/error.h"
#include "core/file.h"

namespace weft::apps {
namespace {

constexpr const char* kFormat = "weft gemm algorithms 1";
constexpr const char* kWhere = "gemm algorithms";

nlohmann::json parse(const std::string& path) {
  try {
    return nlohmann::json::parse(read_input(path));
  } catch (const nlohmann::json::parse_error& error) {
    // "[json.exception.parse_error.101] parse error at line 3, column 5: ..."
    const std::string text = error.what();
    const size_t end = text.find("] ");
    fail(ErrorKind::kData, kWhere, path, ": ", end == std::string::npos ? text : text.substr(end + 2));
  }
}

/// A text of an object at `place`.
std::string text_at(const nlohmann::json& object, const char* key, const std::string& place) {
  if (object.is_object()) {
    const auto found = object.find(key);
    if (found != object.end() && found->is_string()) return found->get<std::string>();
  }
  fail(ErrorKind::kData, kWhere, place, " must have a text named ", quoted(key));
}

}  // namespace

void write_gemm_algorithms_file(const std::string& path, const GemmLibrary& library,
                                std::span<const GemmAlgorithm> algorithms, double peak_flops) {
  nlohmann::ordered_json products = nlohmann::ordered_json::array();
  for (const GemmAlgorithm& each : algorithms) {
    products.push_back({{"product", each.product},
                        {"algorithm", each.algorithm},
                        {"microseconds", each.seconds * 1e6},
                        {"first_choice_microseconds", each.first_choice_seconds * 1e6},
                        {"percent_of_peak", 100 * each.flops / each.seconds / peak_flops},
                        {"candidates", each.candidates}});
  }
  const nlohmann::ordered_json all = {{"format", kFormat},
                                      {"device", library.device},
                                      {"library", library.version},
                                      {"peak_flops", peak_flops},
                                      {"products", std::move(products)}};
  write_file_atomic(path, as_bytes(all.dump(2) + "\n"));
}

void use_gemm_algorithms_file(Device device, const std::string& path) {
  const nlohmann::json all = parse(path);
  if (const std::string format = text_at(all, "format", path); format != kFormat)
    fail(ErrorKind::kData, kWhere, path, ": the format must be ", quoted(kFormat), ", got ", quoted(format));
  const GemmLibrary made{text_at(all, "device", path), text_at(all, "library", path)}, here = gemm_library(device);
  if (made != here) {
    fail(ErrorKind::kData, kWhere, path, " was made for ", made.device, " with ", made.version, "; this is ",
         here.device, " with ", here.version, ". Hint: tune here: weft bench gemm --tune FILE");
  }
  const auto products = all.find("products");
  if (products == all.end() || !products->is_array() || products->empty())
    fail(ErrorKind::kData, kWhere, path, " must have a list named \"products\" that is not empty");
  std::vector<GemmAlgorithm> algorithms;
  for (size_t i = 0; i < products->size(); ++i) {
    const std::string place = concat(path, ": products[", i, "]");
    GemmAlgorithm each;
    each.product = text_at((*products)[i], "product", place);
    each.algorithm = text_at((*products)[i], "algorithm", place);
    algorithms.push_back(std::move(each));
  }
  use_gemm_algorithms(device, algorithms, path);
}

}  // namespace weft::apps
