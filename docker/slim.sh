#!/bin/sh
# Removes from the virtual environment $1 what a server of text models never loads, strips symbols, and compiles the rest
# to bytecode: the image's file system may be read-only.
set -eu
packages=$(echo "$1"/lib/python3*/site-packages)

# Headers, static libraries, tests, tools.
rm -rf "$1"/include "$1"/share "$packages"/torch/include "$packages"/torch/test "$packages"/torch/share
find "$packages"/torch/bin -type f ! -name torch_shm_manager -delete
find "$1" \( -name '*.a' -o -name '*.dbg' \) -delete
find "$packages" -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} +
# Intel's OpenMP brings runtimes for offloading to its GPUs.
find "$1"/lib -maxdepth 1 \( -name 'libomptarget*' -o -name 'libur_*' -o -name 'libpi_*' -o -name 'libsycl*' \) -delete
# vLLM decodes video with it, and does without it where it is missing; polylogit takes text only.
rm -rf "$packages"/cv2 "$packages"/opencv_python_headless*

# Libraries that auditwheel patched do not survive strip; these it did not.
find "$packages"/torch/lib "$packages"/vllm "$packages"/llvmlite -name '*.so' -exec strip --strip-unneeded {} +
# Some packages ship files for newer Pythons, or templates, which do not compile; nothing imports them.
"$1"/bin/python -m compileall -q -j 0 "$packages" >/dev/null || true
