// Loaded before the tests: the client from its sources, as the page is built.

import { registerHooks } from "node:module";

const client = new URL("../../shared/client/src/index.ts", import.meta.url).href;
registerHooks({ resolve: (name, context, next) => next(name === "@tapeline/client" ? client : name, context) });
