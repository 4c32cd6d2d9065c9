//! Finding agents by what they say of themselves: their cards, made ready to be searched.
//!
//! A card is anything; of it, `name`, `description`, `tags` and `skills` are looked at. A skill is a string or, as in an A2A
//! Agent Card, an object with `id`, `name`, `description` and `tags`. Case makes no difference.

use std::{fmt::Write, sync::Arc};

use serde::{Serialize, Serializer};
use serde_json::{Value, value::RawValue};

use crate::credentials::token::AgentId;

/// Bytes of a card's texts that are looked at, together: all of any honest card, and what ten thousand take is searched in a
/// few milliseconds.
const MAX_TEXT: usize = 2_048;

/// Words of one search.
pub const MAX_WORDS: usize = 16;

/// What is searched of one card, in lower case.
#[derive(Debug)]
pub struct Profile {
    /// Ids and names.
    skills: Vec<Box<str>>,
    tags: Vec<Box<str>>,
    /// All of it, a line each.
    text: Box<str>,
}

/// Whom to find: all that is given must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    skill: Option<String>,
    tag: Option<String>,
    /// Each of which is somewhere in the text.
    words: Vec<String>,
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
        let asked =
            |text: Option<&str>| text.map(str::trim).filter(|text| !text.is_empty()).map(str::to_lowercase);
        let words: Vec<_> = text.unwrap_or_default().split_whitespace().map(str::to_lowercase).collect();
        (words.len() <= MAX_WORDS).then(|| Self { skill: asked(skill), tag: asked(tag), words })
    }

    /// Whether an agent with such a card is meant.
    #[must_use]
    pub fn fits(&self, profile: Option<&Profile>) -> bool {
        let Some(profile) = profile else { return *self == Self::default() };
        let among = |wanted: &Option<String>, all: &[Box<str>]| {
            wanted.as_deref().is_none_or(|wanted| all.iter().any(|one| **one == *wanted))
        };
        among(&self.skill, &profile.skills)
            && among(&self.tag, &profile.tags)
            && self.words.iter().all(|word| profile.text.contains(&**word))
    }
}

impl Profile {
    /// `None` where there is nothing to be found by.
    #[must_use]
    pub fn of(card: &RawValue) -> Option<Box<Self>> {
        let card: Value = serde_json::from_str(card.get()).ok()?;
        let skills = card["skills"].as_array().into_iter().flatten();
        let (mut names, mut tags, mut text) = (Vec::new(), strings(&card["tags"]), String::new());
        add(&mut text, [&card["name"], &card["description"]]);
        for skill in skills {
            let own: Vec<_> = [skill, &skill["id"], &skill["name"]].into_iter().filter_map(lowered).collect();
            own.iter().for_each(|name| add_line(&mut text, name));
            names.extend(own);
            add(&mut text, [&skill["description"]]);
            tags.extend(strings(&skill["tags"]));
        }
        tags.iter().for_each(|tag| add_line(&mut text, tag));
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        (!text.is_empty()).then(|| Box::new(Self { skills: names, tags, text: text.into() }))
    }
}

fn lowered(value: &Value) -> Option<Box<str>> {
    value.as_str().map(|text| text.trim().to_lowercase().into())
}

fn strings(list: &Value) -> Vec<Box<str>> {
    list.as_array().into_iter().flatten().filter_map(lowered).collect()
}

fn add<'a>(text: &mut String, values: impl IntoIterator<Item = &'a Value>) {
    values.into_iter().filter_map(lowered).for_each(|value| add_line(text, &value));
}

fn add_line(text: &mut String, line: &str) {
    let _ = writeln!(text, "{line}");
}

#[cfg(test)]
mod tests {
    use serde_json::{json, value::to_raw_value};

    use super::{MAX_WORDS, Profile, Query};

    fn found(card: &serde_json::Value, skill: &str, tag: &str, text: &str) -> bool {
        let profile = Profile::of(&to_raw_value(card).unwrap());
        Query::new(Some(skill), Some(tag), Some(text)).unwrap().fits(profile.as_deref())
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
