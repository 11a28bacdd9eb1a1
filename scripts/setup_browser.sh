#!/usr/bin/env bash
# Install the requirements of the photo search's tests: Debian's Chromium, axe-core (accessibility)
# and opencv-doc, which contains a real surveillance clip (vtest.avi). Without the clip, the test
# that reads it is skipped.
#   bash scripts/setup_browser.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=4.14.1
target=output/browser
clip=/usr/share/doc/opencv-doc/examples/data/vtest.avi  # or vtest.avi.gz
needed=()
command -v chromium >/dev/null 2>&1 || needed+=(chromium)
[ -f "$target/axe-$version.min.js" ] || command -v npm >/dev/null 2>&1 || needed+=(npm)
[ -f "$clip" ] || [ -f "$clip.gz" ] || needed+=(opencv-doc)
if [ ${#needed[@]} -gt 0 ]; then
    root=()
    [ "$(id -u)" -eq 0 ] || root=(sudo)
    "${root[@]}" apt-get update --quiet
    "${root[@]}" apt-get install --yes --quiet --no-install-recommends "${needed[@]}"
fi
if [ ! -f "$target/axe-$version.min.js" ]; then
    mkdir -p "$target"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    npm pack --silent --pack-destination "$work" "axe-core@$version" >/dev/null
    tar -xzf "$work/axe-core-$version.tgz" -C "$work" package/axe.min.js
    mv "$work/package/axe.min.js" "$target/axe-$version.min.js"
fi
