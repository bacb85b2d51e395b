#pragma once
#include <string>
#include <vector>

#include "dist/group.h"
#include "dist/store.h"

namespace weft::dist {

/// A text of every rank, on every rank.
std::vector<std::string> gather_texts(Group& group, const std::string& own);

/// The same through a store, for ranks that have no group yet. @param name  of this exchange alone
/// @param timeout  seconds to wait for each rank. @throws Error kIo if one does not come.
std::vector<std::string> gather_texts(Store& store, const std::string& name, int rank, int size, const std::string& own,
                                      double timeout);

}  // namespace weft::dist
