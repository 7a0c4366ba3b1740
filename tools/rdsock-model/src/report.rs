//! What the devices did.

use rdsock_model::Counters;
use serde_json::{Value, json};

/// A line for a device.
pub fn line(node: u16, counters: &Counters) -> Value {
    let Counters {
        register_reads,
        register_writes,
        doorbells,
        head_updates,
        descriptors,
        descriptor_reads,
        payload_reads,
        payload_writes,
        bytes_read,
        bytes_written,
        words,
        completions,
        status_writes,
        window_messages,
        messages_out,
        messages_in,
        notifications_in,
        refused_here,
        refused_there,
        dma_faults,
        held,
        lanes_failed,
        sets_failed,
        interrupts,
        resets,
    } = counters;
    json!({
        "node": node,
        "register_reads": register_reads,
        "register_writes": register_writes,
        "doorbells": doorbells,
        "head_updates": head_updates,
        "descriptors": descriptors,
        "descriptor_reads": descriptor_reads,
        "payload_reads": payload_reads,
        "payload_writes": payload_writes,
        "bytes_read": bytes_read,
        "bytes_written": bytes_written,
        "words": words,
        "completions": completions,
        "status_writes": status_writes,
        "window_messages": window_messages,
        "messages_out": messages_out,
        "messages_in": messages_in,
        "notifications_in": notifications_in,
        "refused_here": refused_here,
        "refused_there": refused_there,
        "dma_faults": dma_faults,
        "held": held,
        "lanes_failed": lanes_failed,
        "sets_failed": sets_failed,
        "interrupts": interrupts,
        "resets": resets,
    })
}
