#!/usr/bin/env bash
# Fetch and unpack the packages that the picture world is drawn from; nothing is installed.
#
#   bash tools/fetch_pictures.sh DEST
#   mmdlm data build pictures OUT --source DEST
#
# Needs npm (only to download), apt-get and dpkg-deb: a Debian or Ubuntu with nodejs. What is already there is kept.
#
#   fluentui-emoji 1.3.0     drawings in two styles, flat and modern    MIT
#   @twemoji/svg 15.0.0      drawings                                   CC BY 4.0
#   openmoji 17.0.0          drawings, the held-out style               CC BY-SA 4.0
#   emojibase-data 17.0.0    Unicode's (CLDR) names, tags and groups    MIT
#   fonts-noto-color-emoji   drawings, as bitmaps in a font             OFL 1.1, images mostly Apache 2.0
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bash tools/fetch_pictures.sh DEST (the directory to unpack into)" >&2
    exit 2
fi
for program in npm apt-get dpkg-deb tar; do
    if ! command -v "$program" >/dev/null; then
        echo "$program is missing: install it (Debian: apt-get install npm apt dpkg tar) and run this again." >&2
        exit 2
    fi
done
mkdir -p "$1"
dest=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

npm_package() { # NAME@VERSION FOLDER
    if [ -e "$dest/$2/package.json" ]; then
        echo "$1 is there"
        return
    fi
    echo "$1 ..."
    (cd "$work" && npm pack --silent "$1" >archive.name)
    mkdir "$work/unpacked"
    tar -xzf "$work/$(tail -n 1 "$work/archive.name")" -C "$work/unpacked" --strip-components=1
    rm -rf "${dest:?}/$2"
    mv "$work/unpacked" "$dest/$2" # only a whole package gets its name
}

debian_package() { # NAME VERSION FOLDER
    if [ -d "$dest/$3/usr" ]; then
        echo "$1 is there"
        return
    fi
    echo "$1 ..."
    (
        cd "$work"
        # the named version where the archive still has it, else the newest
        apt-get download "$1=$2*" >download.log 2>&1 || {
            echo "$1 $2 is not to be had here, taking the newest: its drawings may differ in places" >&2
            apt-get download "$1" || {
                echo "apt-get can not download $1: run 'apt-get update' and then this again." >&2
                exit 2
            }
        }
        dpkg-deb --extract "$1"_*.deb extracted
    )
    rm -rf "${dest:?}/$3"
    mv "$work/extracted" "$dest/$3"
}

npm_package fluentui-emoji@1.3.0 fluentui-emoji
npm_package @twemoji/svg@15.0.0 twemoji-svg
npm_package openmoji@17.0.0 openmoji
npm_package emojibase-data@17.0.0 emojibase-data
debian_package fonts-noto-color-emoji 2.042 noto
echo "the packages are in $dest; now: mmdlm data build pictures OUT --source $dest"
