# Read before llama.cpp's own CMakeLists.txt, when scripts/build-lib.sh builds it.

# Command lines, chats and downloads, a third of the C++: llama-cpp-2 asks its sys crate for them whatever its own features,
# and nothing of the engine calls them.
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)
