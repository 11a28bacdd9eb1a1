#!/usr/bin/env bash
# Refresh the README's picture from the demo's report; needs Chromium.
#   bash scripts/demo.sh && bash scripts/report_picture.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
"${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run \
    --disable-background-networking --disable-component-update --disable-sync \
    --user-data-dir="$profile" --force-color-profile=srgb --window-size=1240,1600 \
    --screenshot="$PWD/docs/images/report.png" "file://$PWD/output/demo/report.html" 2> "$profile/log" \
    || { cat "$profile/log" >&2; exit 1; }
echo "docs/images/report.png: $(stat -c %s docs/images/report.png) bytes"
