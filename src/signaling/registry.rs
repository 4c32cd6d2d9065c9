//! Finding agents by what they say of themselves: their cards, made ready to be searched.
//!
//! A card is anything; of it, `name`, `description`, `tags` and `skills` are looked at. A skill is a string or, as in an A2A
//! Agent Card, an object with `id`, `name`, `description` and `tags`. Case makes no difference.

use std::sync::Arc;

use memchr::memmem::Finder;
use serde::{Serialize, Serializer};
use serde_json::{Value, value::RawValue};

use crate::credentials::token::AgentId;

/// Bytes of a card's texts that are looked at, together: all of any honest card, and what ten thousand take is searched in a
/// few milliseconds.
const MAX_TEXT: usize = 2_048;

/// Words of one search.
pub const MAX_WORDS: usize = 16;

/// What is searched of one card, in lower case: in one piece of memory, for there may be many.
#[derive(Debug)]
pub struct Profile {
    /// Ids and names of skills, then tags, each between marks; then all texts, a line each.
    all: Box<str>,
    /// Where the texts begin.
    texts: usize,
}

/// Around what is compared whole. No text holds them.
const SKILL: char = '\u{1}';
const TAG: char = '\u{2}';

/// Whom to find: all that is given must fit.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// In their marks.
    whole: Vec<Finder<'static>>,
    /// Each of which is somewhere in the texts.
    words: Vec<Finder<'static>>,
}

/// Agents of a room, in order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Page {
    pub agents: Vec<Entry>,
    /// Of all that fit, on this page or not.
    pub agent_count: usize,
    /// Ask again `after` this one for more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<AgentId>,
}

/// An agent, and what it says of itself.
#[derive(Debug, Serialize)]
pub struct Entry {
    pub agent: AgentId,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_it_is")]
    pub card: Option<Arc<RawValue>>,
}

fn as_it_is<S: Serializer>(card: &Option<Arc<RawValue>>, serializer: S) -> Result<S::Ok, S::Error> {
    card.as_deref().serialize(serializer)
}

impl Query {
    /// What is `None`, or empty, is not asked for. `None` when there are more than [`MAX_WORDS`] words.
    #[must_use]
    pub fn new(skill: Option<&str>, tag: Option<&str>, text: Option<&str>) -> Option<Self> {
        let finder = |needle: &str| Finder::new(needle).into_owned();
        let asked = [(skill, SKILL), (tag, TAG)].map(|(asked, mark)| {
            let asked = lowered(asked.unwrap_or_default());
            (!asked.is_empty()).then(|| finder(&format!("{mark}{asked}{mark}")))
        });
        let words: Vec<_> =
            text.unwrap_or_default().split_whitespace().map(|word| finder(&lowered(word))).collect();
        let whole = asked.into_iter().flatten().collect();
        (words.len() <= MAX_WORDS).then_some(Self { whole, words })
    }

    /// Whether an agent with such a card is meant.
    #[must_use]
    pub fn fits(&self, profile: Option<&Profile>) -> bool {
        let Some(Profile { all, texts }) = profile else {
            return self.whole.is_empty() && self.words.is_empty();
        };
        let (whole, texts) = all.as_bytes().split_at(*texts);
        let is_in = |text, needles: &[Finder<'_>]| needles.iter().all(|needle| needle.find(text).is_some());
        is_in(whole, &self.whole) && is_in(texts, &self.words)
    }
}

impl Profile {
    /// `None` where there is nothing to be found by.
    #[must_use]
    pub fn of(card: &RawValue) -> Option<Self> {
        let card: Card = serde_json::from_str::<Value>(card.get()).ok().as_ref().map(Card::of)?;
        let marked = |mark: char| move |name: &String| format!("{mark}{name}{mark}");
        let skills = card.skills.iter().map(marked(SKILL));
        let mut all: String = skills.chain(card.tags.iter().map(marked(TAG))).collect();
        let mut lines = card.texts;
        lines.extend(card.skills.into_iter().chain(card.tags));
        let text = lines.join("\n");
        let texts = all.len();
        all.push_str(&text[..text.floor_char_boundary(MAX_TEXT)]);
        (!all.is_empty()).then(|| Self { all: all.into(), texts })
    }
}

/// What a card says that is of interest, in lower case.
#[derive(Default)]
struct Card {
    skills: Vec<String>,
    tags: Vec<String>,
    texts: Vec<String>,
}

impl Card {
    fn of(json: &Value) -> Self {
        let mut card = Self { tags: strings(list(&json["tags"])), ..Self::default() };
        card.texts = strings([&json["name"], &json["description"]]);
        for skill in list(&json["skills"]) {
            card.skills.extend(strings([skill, &skill["id"], &skill["name"]]));
            card.texts.extend(strings([&skill["description"]]));
            card.tags.extend(strings(list(&skill["tags"])));
        }
        card
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Those that are any.
fn strings<'a>(values: impl IntoIterator<Item = &'a Value>) -> Vec<String> {
    values.into_iter().filter_map(Value::as_str).map(lowered).collect()
}

fn lowered(text: &str) -> String {
    text.trim().chars().filter(|c| !matches!(*c, SKILL | TAG)).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{json, value::to_raw_value};

    use super::{MAX_WORDS, Profile, Query};

    fn found(card: &serde_json::Value, skill: &str, tag: &str, text: &str) -> bool {
        let profile = Profile::of(&to_raw_value(card).unwrap());
        Query::new(Some(skill), Some(tag), Some(text)).unwrap().fits(profile.as_ref())
    }

    #[test]
    fn a_plain_card_is_found_by_all_that_is_on_it() {
        let card = json!({"name": "Übersetzer", "description": "Translates legal texts", "skills": ["Translate", "proofread"], "tags": ["GPU", "eu"]});
        for (skill, tag, text) in [
            ("", "", ""),
            ("translate", "", ""),
            ("TRANSLATE", "gpu", "legal"),
            ("", "", "  texts   LEGAL "),
            ("", "", "ranslat"),
            ("", "", "übersetzer"),
            ("", "", "proofread"),
            ("", "", "gpu"),
        ] {
            assert!(found(&card, skill, tag, text), "{skill} {tag} {text}");
        }
        for (skill, tag, text) in
            [("transl", "", ""), ("translate", "cpu", ""), ("eu", "", ""), ("", "", "legal advice")]
        {
            assert!(!found(&card, skill, tag, text), "{skill} {tag} {text}");
        }
    }

    #[test]
    fn an_agent_card_of_a2a_is_found_by_its_skills() {
        let card = json!({
            "protocolVersion": "0.3.0", "name": "Route planner", "url": "https://example.org/a2a", "version": "1.0.0",
            "capabilities": {"streaming": true}, "defaultInputModes": ["text/plain"],
            "skills": [{
                "id": "route-optimizer", "name": "Traffic-aware route", "description": "Finds the fastest way",
                "tags": ["maps", "Routing"], "examples": ["from A to B"],
            }],
        });
        assert!(
            found(&card, "route-optimizer", "", "")
                && found(&card, "traffic-aware route", "routing", "fastest")
        );
        assert!(!found(&card, "maps", "", "") && !found(&card, "", "", "from a to b"));
    }

    #[test]
    fn any_other_card_is_found_by_nothing() {
        for card in [
            json!({}),
            json!({"name": 7, "skills": {"a": 1}, "tags": "gpu"}),
            json!({"skills": [null, 7, []]}),
        ] {
            assert!(
                found(&card, "", "", "") && !found(&card, "", "", "a") && !found(&card, "7", "", ""),
                "{card}"
            );
        }
        let long = json!({"description": "é".repeat(3_000), "tags": ["late"]});
        assert!(found(&long, "", "late", "") && !found(&long, "", "", "late"), "so much text and no more");
    }

    #[test]
    fn words_are_counted() {
        assert!(Query::new(None, None, Some(&"a ".repeat(MAX_WORDS))).is_some());
        assert!(Query::new(None, None, Some(&"a ".repeat(MAX_WORDS + 1))).is_none());
    }
}
