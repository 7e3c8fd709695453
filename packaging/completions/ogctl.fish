# fish completion for ogctl(1)
#
# Everything is asked of ogctl itself: its options, and the clusters, nodes, models, tiers and jobs of the running
# daemon. A line of the answer is a word, a tab, and what it is.

function __ogctl_complete
    set -l words (commandline --current-process --tokenize --cut-at-cursor)
    set -l token (commandline --current-token --cut-at-cursor)
    # A quote that is still open cannot be taken away as a pair.
    set -l word (string unescape -- "$token")
    or set word (string trim --left --chars '"\'' -- "$token")
    command ogctl __complete fish $words "$word" 2>/dev/null
end

complete --command ogctl --no-files --keep-order --arguments '(__ogctl_complete)'
