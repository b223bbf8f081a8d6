#!/usr/bin/env bash
# Builds and runs the image without a docker engine: buildah builds, podman runs, both as root.
#
#   tools/image.sh build TAG [BUILD OPTION...]     e.g. build video-lab:cpu --build-arg EXTRA=cpu
#   tools/image.sh run [RUN OPTION...] TAG [ARG...]     e.g. run --read-only video-lab:cpu --help
#   tools/image.sh remove                          deletes the store with every image in it
#
# VIDEO_LAB_IMAGE_STORE   folder of the images (default: video-lab-image in the system's temporary folder)
# VIDEO_LAB_BASE_IMAGE    base image to pull or use (default: a Debian bookworm made here by mmdebstrap, no registry)
#
# Needs buildah, podman, runc and mmdebstrap: apt-get install --no-install-recommends buildah podman runc mmdebstrap
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
store=${VIDEO_LAB_IMAGE_STORE:-${TMPDIR:-/tmp}/video-lab-image}

die() {
  echo "tools/image.sh: $1" >&2
  exit 2
}

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

check() {
  [[ $(id -u) == 0 ]] || die "needs root: the build mounts file systems"
  local missing=() tool
  for tool in "$@"; do
    command -v "$tool" >/dev/null || missing+=("$tool")
  done
  ((${#missing[@]} == 0)) || die "not installed: ${missing[*]}. Try: apt-get install --no-install-recommends ${missing[*]}"
}

# Use overlay if the kernel allows it: with vfs every container copies the whole image.
choose_driver() {
  local probe=$store/probe
  mkdir -p "$probe"/{lower,upper,work,merged}
  if mount -t overlay overlay -o "lowerdir=$probe/lower,upperdir=$probe/upper,workdir=$probe/work" "$probe/merged" 2>/dev/null; then
    umount "$probe/merged"
    echo overlay
  else
    echo vfs
  fi
  rm -rf "$probe"
}

# A limit that runc may set without CAP_SYS_RESOURCE: at most the limit of this shell.
limit() {
  local hard
  hard=$(ulimit "$1")
  if [[ $hard == unlimited || $hard -gt $2 ]]; then echo "$2"; else echo "$hard"; fi
}

use_store() {
  mkdir -p "$store"
  export CONTAINERS_STORAGE_CONF=$store/storage.conf CONTAINERS_CONF=$store/containers.conf
  if [[ ! -e $CONTAINERS_STORAGE_CONF ]]; then
    printf '[storage]\ndriver = "%s"\ngraphroot = "%s/graph"\nrunroot = "%s/run"\n' \
      "$(choose_driver)" "$store" "$store" >"$CONTAINERS_STORAGE_CONF.$$"
    mv "$CONTAINERS_STORAGE_CONF.$$" "$CONTAINERS_STORAGE_CONF"
  fi
  local files processes
  files=$(limit -Hn 65536) processes=$(limit -Hu 4096)
  # runc, because crun refuses a hybrid cgroup hierarchy. There may be no journal and no systemd.
  printf '[containers]\ndefault_ulimits = ["nofile=%s:%s", "nproc=%s:%s"]\n[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n' \
    "$files" "$files" "$processes" "$processes" >"$CONTAINERS_CONF.$$"
  mv "$CONTAINERS_CONF.$$" "$CONTAINERS_CONF"
}

# Prints the base image's name. Makes the image first, from this machine's Debian sources if they fit.
base_image() {
  if [[ -n ${VIDEO_LAB_BASE_IMAGE:-} ]]; then
    echo "$VIDEO_LAB_BASE_IMAGE"
    return
  fi
  local name=localhost/video-lab-base:bookworm sources=/etc/apt/sources.list.d/debian.sources container
  if ! buildah inspect --type image "$name" >/dev/null 2>&1; then
    check mmdebstrap
    local from=()
    if [[ -r $sources ]] && grep -q '^Suites:.*bookworm' "$sources"; then from=("$sources"); fi
    mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$store/base.tar" "${from[@]}" >&2
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$store/base.tar" / >/dev/null
    buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd /bin/bash "$container"
    buildah commit --quiet --rm "$container" "$name" >/dev/null
    rm -f "$store/base.tar"
  fi
  echo "$name"
}

build() {
  (($# > 0)) || die "build needs a TAG"
  local tag=$1 base volumes=() volume
  shift
  check buildah python3
  use_store
  base=$(base_image)
  while IFS= read -r volume; do
    volumes+=(--volume "$volume")
  done < <(python3 "$root/tools/pip_settings.py" "$store/pip")
  ((${#volumes[@]} > 0)) || die "pip's settings could not be read (python3 -m pip config list)"
  # --format docker keeps SHELL and STOPSIGNAL; chroot isolation works inside a container as well.
  buildah build --format docker --layers --isolation chroot \
    --build-arg BASE_IMAGE="$base" --build-arg REVISION="$(git -C "$root" rev-parse --verify --quiet HEAD || true)" \
    --secret id=pipconf,src="$store/pip/pip.conf" "${volumes[@]}" "$@" \
    --tag "$tag" --file "$root/Dockerfile" "$root"
  # Remove unused leftovers of earlier builds. Layers of tagged images stay and make the next build faster.
  if command -v podman >/dev/null; then podman --log-level fatal image prune --force >/dev/null; fi
}

case ${1:-} in
  build)
    shift
    build "$@"
    ;;
  run)
    shift
    check podman runc
    use_store
    exec podman --log-level fatal run --rm "$@"
    ;;
  remove)
    check podman
    use_store
    podman --log-level fatal system reset --force >/dev/null
    rm -rf "$store"
    ;;
  -h | --help | help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
