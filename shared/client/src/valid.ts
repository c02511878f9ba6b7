// Whether an event is what its type says, by the schema that the server holds it to. Pure.

import { SHAPES } from "./schema.ts";

/** Of JSON Schema, what the schema of events needs; what an object has besides its properties may be anything. */
export interface Shape {
  readonly type?: string;
  readonly enum?: readonly unknown[];
  readonly anyOf?: readonly Shape[];
  readonly minimum?: number;
  readonly maximum?: number;
  readonly pattern?: string;
  readonly items?: Shape;
  readonly properties?: Readonly<Record<string, Shape>>;
  readonly required?: readonly string[];
  readonly additionalProperties?: Shape;
}

/** Whoever runs a pool of tools writes events. What is not valid adds nothing to a state, here or on the server. */
export function isValid(event: { readonly type: string }): boolean {
  return isKnown(event.type) && fits(event, SHAPES[event.type] as Shape);
}

/** Whether this version knows events of this type. */
export function isKnown(type: string): boolean {
  return Object.hasOwn(SHAPES, type);
}

function fits(value: unknown, shape: Shape): boolean {
  const { anyOf, enum: values, type, minimum = -Infinity, maximum = Infinity, pattern = "", items = {} } = shape;
  if (anyOf) return anyOf.some((one) => fits(value, one));
  if (values) return values.includes(value);
  switch (type) {
    case undefined:
      return true;
    case "null":
      return value === null;
    case "string":
      return typeof value === "string" && new RegExp(pattern, "u").test(value);
    case "integer":
      return Number.isInteger(value) && fits(value, { ...shape, type: "number" });
    case "number":
      return typeof value === "number" && value >= minimum && value <= maximum;
    case "array":
      return Array.isArray(value) && value.every((one) => fits(one, items));
    case "object":
      return typeof value === "object" && value !== null && !Array.isArray(value) && hasAll(value, shape);
    default:
      return typeof value === type;
  }
}

function hasAll(value: object, { properties = {}, required = [], additionalProperties = {} }: Shape): boolean {
  return (
    required.every((name) => Object.hasOwn(value, name)) &&
    Object.entries(value).every(([name, part]) =>
      fits(part, (Object.hasOwn(properties, name) && properties[name]) || additionalProperties),
    )
  );
}
