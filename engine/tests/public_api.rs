//! The public API as text, so that a change of it is seen and reviewed.
//!
//! `STOQ_WRITE_PUBLIC_API=1 cargo test -p stoq --test public_api` writes `PUBLIC_API.txt`;
//! without the variable the test shows the difference and fails.
//!
//! The list is every `pub` item of every module of the source. That is the public API because
//! the lint `unreachable_pub` forbids `pub` on what cannot be reached from outside. Items that a
//! macro makes are shown by the macro's input.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use quote::ToTokens;
use syn::{Attribute, Fields, ImplItem, Item, TraitItem, Type, Visibility};

/// Lines of the list, and what is needed to leave private types out.
#[derive(Default)]
struct Api {
    lines: BTreeSet<String>,
    types: HashSet<String>,
    /// Trait implementations: the type's name, the line.
    impls: Vec<(String, String)>,
}

impl Api {
    fn file(&mut self, path: &Path, module: &str, children: &Path) {
        let text = std::fs::read_to_string(path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = syn::parse_file(&text)
            .unwrap_or_else(|error| panic!("{} does not parse: {error}", path.display()));
        for item in &file.items {
            self.item(item, module, children);
        }
    }

    fn line(&mut self, at: &str, what: &str) {
        self.lines.insert(format!("{at}: {what}"));
    }

    fn item(&mut self, item: &Item, module: &str, children: &Path) {
        match item {
            Item::Mod(item) if !is_test(&item.attrs) => {
                let inner = format!("{module}::{}", item.ident);
                let directory = children.join(item.ident.to_string());
                if let Some((_, items)) = &item.content {
                    items.iter().for_each(|item| self.item(item, &inner, &directory));
                    return;
                }
                let flat = directory.with_extension("rs");
                let path = if flat.exists() { flat } else { directory.join("mod.rs") };
                self.file(&path, &inner, &directory);
            }
            Item::Fn(item) if public(&item.vis) => self.line(module, &text(&item.sig)),
            Item::Const(item) if public(&item.vis) => {
                self.line(module, &format!("const {}: {}", item.ident, text(&item.ty)));
            }
            Item::Static(item) if public(&item.vis) => {
                self.line(module, &format!("static {}: {}", item.ident, text(&item.ty)));
            }
            Item::Type(item) if public(&item.vis) => {
                self.line(module, &format!("type {} = {}", item.ident, text(&item.ty)));
            }
            Item::Use(item) if public(&item.vis) && !is_test(&item.attrs) => {
                self.line(module, &format!("use {}", text(&item.tree)));
            }
            Item::Struct(item) if public(&item.vis) => {
                self.types.insert(item.ident.to_string());
                let name = format!("{}{}", item.ident, text(&item.generics));
                self.line(module, &format!("struct {name}{}", exhaustive(&item.attrs)));
                self.fields(&format!("{module}::{}", item.ident), &item.fields, false);
            }
            Item::Enum(item) if public(&item.vis) => {
                self.types.insert(item.ident.to_string());
                let name = format!("{}{}", item.ident, text(&item.generics));
                self.line(module, &format!("enum {name}{}", exhaustive(&item.attrs)));
                for variant in &item.variants {
                    let at = format!("{module}::{}::{}", item.ident, variant.ident);
                    self.line(&at, "variant");
                    self.fields(&at, &variant.fields, true);
                }
            }
            Item::Trait(item) if public(&item.vis) => {
                self.types.insert(item.ident.to_string());
                let supertraits = text(&item.supertraits);
                self.line(module, &format!("trait {}: {supertraits}", item.ident));
                let at = format!("{module}::{}", item.ident);
                for member in &item.items {
                    if let TraitItem::Fn(function) = member {
                        let provided = if function.default.is_some() { " { .. }" } else { "" };
                        self.line(&at, &format!("{}{provided}", text(&function.sig)));
                    }
                }
            }
            Item::Impl(item) => self.implementation(item, module),
            // A definition has no input; a use of one makes items out of what it is given.
            Item::Macro(item) if item.ident.is_none() && !is_test(&item.attrs) => {
                let name = text(&item.mac.path);
                let input = without_docs(item.mac.tokens.clone());
                self.line(module, &format!("{name}! {input}"));
            }
            Item::Macro(item) => {
                let at = format!("{module}::{}!", text(&item.ident));
                let body = without_docs(item.mac.tokens.clone());
                for function in body.split("pub fn ").skip(1) {
                    let signature = function.split(" {").next().expect("split gives one");
                    self.line(&at, &format!("fn {signature}"));
                }
            }
            _ => {}
        }
    }

    fn implementation(&mut self, item: &syn::ItemImpl, module: &str) {
        let of = text(&item.self_ty);
        if let Some((bang, path, _)) = &item.trait_ {
            let bang = if bang.is_some() { "!" } else { "" };
            let name = match &*item.self_ty {
                Type::Path(path) => path.path.segments.last().map(|last| last.ident.to_string()),
                _ => None,
            };
            let line = format!("{module}: impl {bang}{} for {of}", text(path));
            self.impls.extend(name.map(|name| (name, line)));
            return;
        }
        let at = format!("{module}::{of}");
        for member in &item.items {
            match member {
                ImplItem::Fn(function) if public(&function.vis) => {
                    self.line(&at, &text(&function.sig));
                }
                ImplItem::Const(constant) if public(&constant.vis) => {
                    self.line(&at, &format!("const {}: {}", constant.ident, text(&constant.ty)));
                }
                ImplItem::Macro(makes) => self.line(&at, &text(&makes.mac)),
                _ => {}
            }
        }
    }

    fn fields(&mut self, at: &str, fields: &Fields, of_variant: bool) {
        for (index, field) in fields.iter().enumerate() {
            if of_variant || public(&field.vis) {
                let name = field.ident.as_ref().map_or_else(|| index.to_string(), text);
                self.line(at, &format!("{name}: {}", text(&field.ty)));
            }
        }
    }
}

fn public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes
        .iter()
        .any(|attribute| attribute.path().is_ident("cfg") && text(&attribute.meta).contains("test"))
}

fn exhaustive(attributes: &[Attribute]) -> &'static str {
    let marked = attributes.iter().any(|attribute| attribute.path().is_ident("non_exhaustive"));
    if marked { " (non-exhaustive)" } else { "" }
}

/// Tokens in one line, with the spaces that a reader expects.
fn text(tokens: &impl ToTokens) -> String {
    let mut line = tokens.to_token_stream().to_string();
    for (from, to) in [
        (" :: ", "::"),
        (":: ", "::"),
        (" < ", "<"),
        ("< ", "<"),
        (" >", ">"),
        ("& ", "&"),
        (" ,", ","),
        (" : ", ": "),
        (" (", "("),
        ("( ", "("),
        (" )", ")"),
        (" ;", ";"),
    ] {
        line = line.replace(from, to);
    }
    line
}

/// The tokens of a macro without doc comments.
fn without_docs(tokens: impl ToTokens) -> String {
    let line = tokens.to_token_stream().to_string();
    let mut kept = String::new();
    for part in line.split('\n') {
        let part = part.trim();
        if !part.starts_with("///") && !part.starts_with("//") {
            kept.push_str(part);
            kept.push(' ');
        }
    }
    // `#[doc = "…"]`, as a doc comment reads once it is tokens.
    let mut result = String::new();
    let mut rest = kept.as_str();
    while let Some(start) = rest.find("# [doc = ").or_else(|| rest.find("#[doc = ")) {
        result.push_str(&rest[..start]);
        rest = rest[start..].split_once("\"]").map_or("", |(_, after)| after);
    }
    result.push_str(rest);
    result.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn the_public_api_is_as_committed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut api = Api::default();
    api.file(&root.join("src/lib.rs"), "stoq", &root.join("src"));
    for (of, line) in std::mem::take(&mut api.impls) {
        if api.types.contains(&of) {
            api.lines.insert(line);
        }
    }
    assert!(api.lines.len() > 300, "the whole crate was read");
    let path = root.join("PUBLIC_API.txt");
    let now = api.lines.iter().fold(String::new(), |all, line| all + line + "\n");
    if std::env::var_os("STOQ_WRITE_PUBLIC_API").is_some() {
        std::fs::write(&path, now).expect("PUBLIC_API.txt can be written");
        return;
    }
    let committed = std::fs::read_to_string(&path).expect("PUBLIC_API.txt is committed");
    let before: BTreeSet<&str> = committed.lines().collect();
    let after: BTreeSet<&str> = now.lines().collect();
    let gone = before.difference(&after).map(|line| format!("- {line}\n"));
    let new = after.difference(&before).map(|line| format!("+ {line}\n"));
    let difference: String = gone.chain(new).collect();
    assert!(
        difference.is_empty(),
        "the public API changed; if that is meant, write it anew with \
         `STOQ_WRITE_PUBLIC_API=1 cargo test -p stoq --test public_api`:\n{difference}"
    );
}
