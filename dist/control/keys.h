#pragma once
#include <string>

namespace weft::dist {

/// What the peers of one run know and nobody else: CurveZMQ key pairs (http://curvezmq.org) as Z85 text of 40
/// characters, and the run's id. All clients share one pair: it says "of this run", not which rank.
struct ControlKeys {
  std::string run_id;  ///< 32 hexadecimal digits
  std::string server_public, server_secret;
  std::string client_public, client_secret;

  /// Fresh keys and a fresh run id, from the system's random source.
  static ControlKeys make();
  /// What a rank needs: without the server's secret.
  ControlKeys for_client() const;

  /// A new file of mode 0600. @throws Error  kIo, also if there is a file of that name.
  void write(const std::string& path) const;
  /// @throws Error  kIo if the file cannot be read; kData if it is not such a file; kUsage if anybody but its owner
  /// (this user or root) may read or write it.
  static ControlKeys read(const std::string& path);
};

/// Whether `text` is 32 lower-case hexadecimal digits.
bool is_run_id(const std::string& text);

/// The id of a part of a run (an attempt, a job that shares its keys with others): a hash of both.
std::string derived_run_id(const std::string& run_id, const std::string& part);

}  // namespace weft::dist
