#include "models/checkpoint/shared_check.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "models/checkpoint/manifest.h"

namespace weft {
namespace {

using Json = nlohmann::json;

std::string to_text(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);  // paths may be of any bytes
}

/// Which rank reads each file: the largest first, each goes to the rank with the fewest bytes until then.
std::vector<int> readers(const std::vector<CheckpointFile>& files, int ranks) {
  std::vector<size_t> order(files.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return files[a].size > files[b].size; });
  std::vector<double> bytes(static_cast<size_t>(ranks), 0);
  std::vector<int> reader(files.size());
  for (const size_t i : order) {
    const auto least = std::min_element(bytes.begin(), bytes.end());
    *least += static_cast<double>(files[i].size);
    reader[i] = static_cast<int>(least - bytes.begin());
  }
  return reader;
}

}  // namespace

std::vector<std::string> verify_checkpoint(const std::string& path, const CheckingRanks& ranks) {
  std::vector<std::string> own;
  const auto attempt = [&](const auto& check) {
    try {
      check();
    } catch (const Error& error) {
      own.emplace_back(error.what());
    }
  };
  CheckpointManifest manifest;
  attempt([&] { manifest = read_checkpoint_manifest(path); });
  const checkpoint::TensorFiles tensors = checkpoint::tensor_files(manifest);
  const std::vector<int> reader = readers(manifest.files, ranks.size);
  for (size_t i = 0; i < manifest.files.size(); ++i) {
    if (reader[i] != ranks.rank) continue;
    const CheckpointFile& file = manifest.files[i];
    if (ranks.on_read) ranks.on_read(file);
    attempt([&] { checkpoint::check_file(path, file, tensors.contains(file.name)); });
  }
  // Whether the files hold the pieces that the manifest says.
  if (own.empty()) attempt([&] { open_verified_checkpoint(path); });
  std::vector<std::string> problems;
  const std::vector<std::string> all = ranks.gather(to_text(own));
  for (size_t rank = 0; rank < all.size(); ++rank) {
    for (const Json& problem : Json::parse(all[rank]))
      problems.push_back(concat(ranks.size > 1 ? concat("rank ", rank, ": ") : "", problem.get<std::string>()));
  }
  return problems;
}

LatestCheckpoint find_latest_checkpoint(const std::string& root, const CheckingRanks& ranks) {
  Json own;
  if (ranks.rank == 0) {
    try {
      own = Json::array();
      for (const checkpoint::DirectoryName& name : checkpoint::directories(root))
        own.push_back(checkpoint::to_string(name));
    } catch (const Error& error) {
      own = error.what();
    }
  }
  const Json names = Json::parse(ranks.gather(to_text(own))[0]);
  if (names.is_string()) throw Error(ErrorKind::kIo, names.get<std::string>());
  LatestCheckpoint latest;
  for (auto name = names.rbegin(); name != names.rend(); ++name) {
    const std::string path = root + "/" + name->get<std::string>();
    const std::vector<std::string> problems = verify_checkpoint(path, ranks);
    if (problems.empty()) {
      latest.path = path;
      break;
    }
    latest.rejected.push_back({path, problems[0]});
  }
  return latest;
}

OpenCheckpoint open_verified_checkpoint(const std::string& path) {
  return checkpoint::open(path, [](const CheckpointFile&) { return false; });
}

}  // namespace weft
