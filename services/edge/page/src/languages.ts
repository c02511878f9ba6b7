// The languages that code is coloured in, as a file of its own that is fetched with the first block of code.

import { common, createLowlight } from "lowlight";

export const lowlight = createLowlight(common);
