# shellcheck shell=bash
# bash completion for ogctl(1)
#
# Everything is asked of ogctl itself: its options, and the clusters, nodes, models, tiers and jobs of the running
# daemon. The answer is quoted as bash wants it.

_ogctl() {
    local candidate
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("$candidate")
    done < <(command ogctl __complete bash "$COMP_WORDBREAKS" "${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
    # After a directory one goes on typing.
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == */ ]]; then
        compopt -o nospace 2>/dev/null
    fi
}

complete -F _ogctl ogctl
