# What the models counted in the suite "programs", for run.sh: counted MODEL'S-OUTPUT CLIENTS'-LOG
#
# The models print what they have counted before a ping-pong of small messages, after it, and at the end. Each access of a driver to a
# register is one that traps: a message of its own on the bus. Beside those for messages there are those of timers: ten times
# a second a poll core looks with two reads whether the device is alive, and tells the other node that it is.
counted() {
    awk -F'[:,{}]' '
        /^COSTS of/ { split($0, word, " "); messages = word[3]; ticks = 11 * (word[10] - word[8]) + 4 }
        /^\{"/ {
            for (i = 2; i < NF; i += 2) { gsub(/"/, "", $i); now[$i] = $(i + 1) }
            if (now["node"] == 1) printed++
            if (now["node"] <= 2) for (what in now) n[printed, now["node"], what] = now[what]
        }
        function grew(node, what) { return n[2, node, what] - n[1, node, what] }
        function test(name, wrong) { print "TEST", name, wrong == "" ? "ok" : "FAILED:" wrong }
        END {
            if (printed != 3 || messages < 100)
                moved = read = trapped = " the models printed " printed + 0 " times, for " messages + 0 " messages"
            for (node = 1; node <= 2; node++) {
                of = " at node " node
                if (n[2, node, "bytes_written"] < 8 * 1048576 || n[2, node, "dma_faults"] || n[2, node, "refused_here"])
                    moved = moved " " n[2, node, "bytes_written"] " bytes, " n[2, node, "dma_faults"] " faults, " \
                        n[2, node, "refused_here"] " refusals" of
                if (grew(node, "register_reads") > 2 * ticks) read = read " " grew(node, "register_reads") of
                # Connecting and ending takes a few.
                if (grew(node, "payload_writes") < messages || grew(node, "register_writes") > messages + ticks + 20)
                    trapped = trapped " " grew(node, "register_writes") " for " grew(node, "payload_writes") of
                print "node " node ": " messages " messages each way, " ticks " ticks: register reads " grew(node, "register_reads") \
                    ", writes " grew(node, "register_writes") ", doorbells " grew(node, "doorbells") ", heads " grew(node, "head_updates") \
                    ", descriptors " grew(node, "descriptors") ", interrupts " grew(node, "interrupts")
            }
            test("the_models_have_moved_the_bytes", moved)
            test("messages_read_no_register", read)
            test("a_message_costs_one_trapped_access", trapped)
        }' "$2" "$1"
}
