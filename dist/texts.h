#pragma once
#include <string>
#include <vector>

#include "dist/group.h"

namespace weft::dist {

/// A text of every rank, on every rank.
std::vector<std::string> gather_texts(Group& group, const std::string& own);

}  // namespace weft::dist
