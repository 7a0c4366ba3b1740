//! Text that does to a terminal nothing but stand there: names of programs and files are somebody's, and may hold what clears the
//! screen, turns the line round or begins a line of its own.

use std::borrow::Cow;

/// What turns a part of a line round (Unicode's bidirectional controls).
fn is_bidi_control(letter: char) -> bool {
    matches!(letter, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// What a terminal would not show as it is. (The two separators begin a line.)
fn is_control(letter: char) -> bool {
    letter.is_control() || is_bidi_control(letter) || matches!(letter, '\u{2028}' | '\u{2029}')
}

fn escaped(text: &str, is_bad: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_bad) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for letter in text.chars() {
        match is_bad(letter) {
            true => shown.extend(letter.escape_unicode()),
            false => shown.push(letter),
        }
    }
    Cow::Owned(shown)
}

/// What stands in a line, or a cell, with all that is no letter of it written out: `\u{1b}` for an escape.
pub fn in_line(text: &str) -> Cow<'_, str> {
    escaped(text, is_control)
}

/// The same for whole lines.
pub(crate) fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |letter| letter != '\n' && is_control(letter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor_or_turns_a_line_round() {
        let name = "a\x1b[2J\u{9b}K\x7f\r\t\u{202e}b\u{2066}\u{61c}\u{2028}\nc";
        assert_eq!(
            in_line(name),
            "a\\u{1b}[2J\\u{9b}K\\u{7f}\\u{d}\\u{9}\\u{202e}b\\u{2066}\\u{61c}\\u{2028}\\u{a}c"
        );
        assert_eq!(lines(name).matches('\n').count(), 1);
        for code in 0..=0xffff {
            let Some(letter) = char::from_u32(code) else {
                continue;
            };
            let text = letter.to_string();
            let shown = in_line(&text);
            assert!(!shown.contains(|shown: char| shown.is_control()));
            let is_plain = shown == text;
            assert!(is_plain || is_control(letter) && shown.is_ascii());
        }
    }

    #[test]
    fn letters_stay() {
        for text in ["nginx: master", "wörker-π-编", "a\u{200d}b", ""] {
            assert!(matches!(in_line(text), Cow::Borrowed(same) if same == text));
        }
    }
}
