# shellcheck shell=bash
# The system tools that some tests need, with their Debian packages. Sourced by launch/test.sh and .ci/run.

# One line per tool: tool, package, what is not tested without it.
TOOLS='
make       build-essential  targets of the Makefile
cc         build-essential  crashes between two system calls
g++        build-essential  compiled models on a CPU
munged     munge            batch scripts on a real Slurm
slurmctld  slurm-wlm        batch scripts on a real Slurm
shellcheck shellcheck       faults in shell scripts
ip         iproute2         jobs on two simulated hosts
openssl    openssl          progress for Kubeflow Trainer
faketime   faketime         wrong clocks
cpulimit   cpulimit         ranks with too little CPU time
zsh        zsh              completion in zsh
fish       fish             completion in fish
chromium   chromium         the report in a browser
'
# Debian installs daemons here, which the PATH of a user may lack.
export PATH=$PATH:/usr/sbin:/sbin

# list_missing_tools: print the lines of TOOLS whose tool is not installed.
list_missing_tools() {
    local tool rest
    while read -r tool rest; do
        [[ -z $tool ]] || command -v "$tool" >/dev/null || echo "$tool $rest"
    done <<<"$TOOLS"
}

# print_install_command: print the line that installs all missing tools on Debian and Ubuntu.
print_install_command() {
    local packages
    packages=$(list_missing_tools | awk '{ print $2 }' | sort -u | paste -sd ' ')
    echo "apt-get update && apt-get install -y --no-install-recommends $packages"
}

# install_missing_tools: install them; needs root.
install_missing_tools() {
    local command
    [[ -n $(list_missing_tools) ]] || return 0
    if ((EUID != 0)); then
        echo "error: only root can install system tools. Run: sudo sh -c '$(print_install_command)'" >&2
        return 1
    fi
    command=$(print_install_command)
    echo "== $command"
    DEBIAN_FRONTEND=noninteractive sh -c "$command"
}

# report_missing_tools: print what is missing, what is therefore not tested, and how to install it.
report_missing_tools() {
    local tool reason
    [[ -n $(list_missing_tools) ]] || return 0
    echo "== system tools that are not installed; the tests that need them are skipped:"
    while read -r tool _ reason; do
        printf '   %-12s%s\n' "$tool" "$reason"
    done < <(list_missing_tools)
    echo "== to install them (or bash launch/test.sh --install): $( ((EUID == 0)) || echo sudo\ )sh -c '$(print_install_command)'"
}
