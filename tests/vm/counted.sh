# What the models have counted, for run.sh.

# moved MODEL'S-OUTPUT: in the suite "programs", whether the bytes went through both devices, and none astray. At the end, after which
# a daemon is killed, the other node may still have written to it.
moved() {
    awk -F'[:,{}]' '
        /^\{"/ {
            for (i = 2; i < NF; i += 2) { gsub(/"/, "", $i); n[$i] = $(i + 1) }
            if (n["node"] > 2) next
            nodes++
            if (n["bytes_written"] < 8 * 1048576 || n["refused_here"])
                wrong = wrong " " n["bytes_written"] " bytes and " n["refused_here"] " refusals at node " n["node"]
        }
        END { print "TEST the_models_have_moved_the_bytes", nodes == 2 && wrong == "" ? "ok" : "FAILED:" wrong }' "$1"
}

# costs MODEL'S-OUTPUT GUEST'S-LOG: in the suite "trapped", what messages cost. The models print what they have counted before a
# ping-pong and after it; the last one counts. Beside accesses for messages there are those of timers: ten times a second a poll core looks with two reads
# whether the device is alive, and tells the other node that it is.
costs() {
    awk -F'[:,{}]' '
        /^HOST count/ { asked++ }
        /^COSTS of/ { split($0, word, " "); messages = word[3]; ticks = 11 * (word[10] - word[8]) + 4 }
        /^\{"/ {
            for (i = 2; i < NF; i += 2) { gsub(/"/, "", $i); now[$i] = $(i + 1) }
            if (now["node"] == 1) printed++
            if (now["node"] <= 2) for (what in now) n[printed, now["node"], what] = now[what]
        }
        function grew(node, what) { return n[asked, node, what] - n[asked - 1, node, what] }
        function test(name, wrong) { print "TEST", name, wrong == "" ? "ok" : "FAILED:" wrong }
        END {
            if (asked < 2 || printed < asked || messages < 100)
                read = trapped = " the models printed " printed + 0 " times, for " messages + 0 " messages"
            for (node = 1; node <= 2; node++) {
                of = " at node " node
                if (grew(node, "register_reads") > 2 * ticks) read = read " " grew(node, "register_reads") of
                # Connecting and ending takes a few.
                if (grew(node, "payload_writes") < messages || grew(node, "register_writes") > messages + ticks + 20)
                    trapped = trapped " " grew(node, "register_writes") " for " grew(node, "payload_writes") of
                print "node " node ": " messages " messages each way, " ticks " ticks: register reads " grew(node, "register_reads") \
                    ", writes " grew(node, "register_writes") ", doorbells " grew(node, "doorbells") ", heads " grew(node, "head_updates") \
                    ", descriptors " grew(node, "descriptors") ", interrupts " grew(node, "interrupts")
            }
            test("messages_read_no_register", read)
            test("a_message_costs_one_trapped_access", trapped)
        }' "$2" "$1"
}
