#pragma once
#include <string>
#include <utility>

#include "core/error.h"

namespace weft::dist {

/// An operation between ranks failed: because ranks did not agree (kState), or because one of them is gone (kIo). All
/// ranks get it, each from the operation that it is in or from its next one, and no operation succeeds after it.
class GroupError : public Error {
 public:
  GroupError(ErrorKind kind, int rank, std::string message) : Error(kind, std::move(message)), rank_(rank) {}
  /// The rank at fault; -1 if it is not one.
  int rank() const { return rank_; }

 private:
  int rank_;
};

}  // namespace weft::dist
