//! `/openapi.json` and the server agree on what null means: every optional field of what is configured or asked, with
//! null in it.

use serde_json::{Value, json};

use crate::support::Running;

/// The schema itself, where this one refers to it.
fn resolve<'d>(document: &'d Value, schema: &'d Value) -> &'d Value {
    match schema["$ref"].as_str() {
        Some(path) => resolve(document, document.pointer(path.trim_start_matches('#')).unwrap()),
        None => schema,
    }
}

fn is_nullable(document: &Value, schema: &Value) -> bool {
    let schema = resolve(document, schema);
    let says_null =
        |kind: &Value| kind == "null" || kind.as_array().is_some_and(|kinds| kinds.contains(&json!("null")));
    let any = schema["anyOf"].as_array().or(schema["oneOf"].as_array());
    says_null(&schema["type"]) || any.is_some_and(|schemas| schemas.iter().any(|one| is_nullable(document, one)))
}

/// A body for every optional field below `schema`, with null there: where it is, whether the schema allows it, the body.
fn with_null(document: &Value, schema: &Value, at: &str, bodies: &mut Vec<(String, bool, Value)>) {
    let schema = resolve(document, schema);
    let required = |name: &str| schema["required"].as_array().is_some_and(|names| names.contains(&json!(name)));
    // What must be there to have null somewhere else.
    let base = || -> serde_json::Map<String, Value> {
        let known = [("filter", json!("a")), ("lease", json!("x")), ("for", json!("1s")), ("secret", json!(SECRET))];
        known.into_iter().filter(|(name, _)| required(name)).map(|(name, value)| (name.to_owned(), value)).collect()
    };
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let mut body = base();
        body.insert(name.clone(), Value::Null);
        bodies.push((format!("{at}{name}"), is_nullable(document, field), Value::Object(body)));
        let field = resolve(document, field);
        let (inner, index) = if field["items"].is_object() { (&field["items"], "[0]") } else { (field, "") };
        let mut inside = Vec::new();
        with_null(document, inner, &format!("{at}{name}{index}."), &mut inside);
        bodies.extend(inside.into_iter().map(|(at, nullable, value)| {
            let mut body = base();
            body.insert(name.clone(), if index.is_empty() { value } else { json!([value]) });
            (at, nullable, Value::Object(body))
        }));
    }
}

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

#[tokio::test]
async fn null_is_taken_where_the_schema_says_so_and_refused_by_name_elsewhere() {
    let running = Running::start().await;
    assert_eq!(running.put("q", r#"{"filter":"q"}"#).await.status, 201);
    let document = running.get("/openapi.json").await.json();
    for (method, path, url, fields) in [
        ("put", "/subscriptions/{name}", "/subscriptions/n", 30),
        ("post", "/subscriptions/{name}/redrive", "/subscriptions/q/redrive", 2),
        ("post", "/subscriptions/{name}/settle", "/subscriptions/q/settle", 14),
    ] {
        let schema = &document["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"];
        let mut bodies = Vec::new();
        with_null(&document, schema, "", &mut bodies);
        assert!(bodies.len() >= fields, "{} fields of {path} are not all", bodies.len());
        for (at, nullable, body) in bodies {
            let reply = running.send(&format!("{} {url}", method.to_uppercase()), &[], body.to_string()).await;
            if nullable {
                assert_eq!(reply.status, 200, "{path} {at}: {body}: {}", reply.text());
            } else {
                reply.is_problem(400, &at);
                reply.is_problem(400, "null");
            }
        }
    }
}
